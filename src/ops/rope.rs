//! Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the rotate-half layout of
//! Hugging Face's Llama and Qwen2: dimension i of a head turns together with i + D/2 by the
//! angle p theta^(-2i/D), where p is the token's position and D the head size.
//!
//! x, y: \[T, heads * D\] f32, bf16 on CUDA. Saved: nothing. Backward is the rotation by the
//! negative angle, in place on the CPU. Least traffic: T heads D values in, as many out, and a row
//! of the table, D values in f32, for each token.

use std::sync::{Arc, OnceLock};

use rayon::prelude::*;

use super::{Operator, expect_cols, expect_inputs, only_grad};
use crate::device::cuda::{Arg, Grid, Kernel, WIDE_F32};
use crate::device::simd::vectorized;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows that one task works through.
const ROWS: usize = 16;

/// Cosines and sines of all positions: computed once in float64, shared by all layers.
#[derive(Debug)]
pub struct RopeTable {
    head_dim: usize,
    /// For each position head_dim / 2 cosines, then as many sines.
    values: Vec<f32>,
    /// The same values on the CUDA device that first asked for them.
    on_device: OnceLock<Tensor>,
}

impl RopeTable {
    /// The table for positions `0..positions`; fails unless `head_dim` is even and not zero.
    pub fn new(positions: usize, head_dim: usize, theta: f64) -> Result<Arc<Self>> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(Error::operand(
                "rope",
                "an even head size",
                format!("{head_dim}"),
            ));
        }
        let half = head_dim / 2;
        let mut values = vec![0.0; positions * head_dim];
        for (position, row) in values.chunks_exact_mut(head_dim).enumerate() {
            let (cos, sin) = row.split_at_mut(half);
            for (i, (cos, sin)) in cos.iter_mut().zip(sin).enumerate() {
                let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
                let angle = position as f64 * frequency;
                *cos = angle.cos() as f32;
                *sin = angle.sin() as f32;
            }
        }
        Ok(Arc::new(Self {
            head_dim,
            values,
            on_device: OnceLock::new(),
        }))
    }

    /// The values on a CUDA device, \[positions, head_dim\] f32.
    pub(super) fn resident(&self, cuda: &CudaDevice) -> Result<Tensor> {
        if let Some(table) = self.on_device.get().filter(|t| cuda.holds(t)) {
            return Ok(table.clone());
        }
        let table = Tensor::from_vec(self.values.clone(), [self.positions(), self.head_dim])?;
        let table = cuda.resident(&table, DType::F32)?;
        // A second device goes without: it keeps no table of its own.
        self.on_device.get_or_init(|| table.clone());
        Ok(table)
    }

    /// Rotates the heads that lie side by side in `row`, which is at `position`.
    ///
    /// # Errors
    /// When the table does not hold the position or the row is not made of heads.
    pub(crate) fn rotate(&self, position: usize, row: &mut [f32]) -> Result<()> {
        if position >= self.positions() || !row.len().is_multiple_of(self.head_dim) {
            return Err(Error::operand(
                Rope::NAME,
                format!(
                    "heads of size {} at a position below {}",
                    self.head_dim,
                    self.positions()
                ),
                format!("{} values at position {position}", row.len()),
            ));
        }
        let angles = &self.values[position * self.head_dim..][..self.head_dim];
        vectorized!(rotate_row(row, angles, 1.0));
        Ok(())
    }

    /// Number of positions that the table holds.
    pub fn positions(&self) -> usize {
        self.values.len() / self.head_dim
    }
}

/// Rotation of queries or keys: one input [T, heads * head size], one output of that shape.
/// Row t is at position `start + t % seq_len`.
pub struct Rope {
    /// Rows of a sequence.
    pub seq_len: usize,
    /// Position of a sequence's first row: not 0 where it continues what a cache holds.
    pub start: usize,
    /// Heads side by side in a row.
    pub heads: usize,
    /// Must hold `start + seq_len` positions.
    pub table: Arc<RopeTable>,
}

impl Rope {
    fn check(&self, x: &Tensor) -> Result<()> {
        expect_cols(Self::NAME, x, self.heads * self.table.head_dim)?;
        let positions = self.table.positions();
        let end = self.start.checked_add(self.seq_len);
        if self.seq_len == 0 || end.is_none_or(|end| end > positions) {
            return Err(Error::operand(
                Self::NAME,
                format!("rows within the table's {positions} positions"),
                format!("{} rows from position {}", self.seq_len, self.start),
            ));
        }
        Ok(())
    }

    /// Rotates by `sign` times the angle: out of `x` where there is one, else in place.
    fn rotate(&self, out: &mut [f32], x: Option<&[f32]>, sign: f32) {
        let cols = self.heads * self.table.head_dim;
        let chunk = (ROWS * cols).max(1);
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| {
            if let Some(x) = x {
                out.copy_from_slice(&x[i * chunk..][..out.len()]);
            }
            for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                let position = self.start + (i * ROWS + row) % self.seq_len;
                let head_dim = self.table.head_dim;
                let angles = &self.table.values[position * head_dim..][..head_dim];
                vectorized!(rotate_row(out, angles, sign));
            }
        });
    }
}

impl Operator for Rope {
    type Saved = ();
    const NAME: &'static str = "rope";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, ())> {
        let [x] = expect_inputs(Self::NAME, inputs)?;
        self.check(x)?;
        let y = match device {
            Device::Cpu(_) => {
                let mut y = device.buffer(x.len());
                self.rotate(&mut y, Some(x.f32s()?), 1.0);
                Tensor::from_buffer(y, x.shape())?
            }
            Device::Cuda(cuda) => self.rotate_cuda(cuda, x, 1.0)?,
        };
        Ok((vec![y], ()))
    }

    fn backward(
        &self,
        device: &Device,
        (): (),
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut grad = only_grad(Self::NAME, grads)?;
        self.check(&grad)?;
        match device {
            Device::Cpu(_) => self.rotate(grad.f32s_mut()?, None, -1.0),
            Device::Cuda(cuda) => grad = self.rotate_cuda(cuda, &grad, -1.0)?,
        }
        Ok(vec![Some(grad)])
    }
}

#[inline(always)]
fn rotate_row(row: &mut [f32], angles: &[f32], sign: f32) {
    let (cos, sin) = angles.split_at(angles.len() / 2);
    for head in row.chunks_exact_mut(angles.len()) {
        let (a, b) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            let sin = sin * sign;
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

const ROTATE: Kernel = Kernel {
    stem: "rope",
    function: "rope_bf16",
};
/// Small blocks, since a thread works through all heads of its token.
const THREADS: u32 = 64;

impl Rope {
    /// Rotates by `sign` times the angle.
    fn rotate_cuda(&self, cuda: &CudaDevice, x: &Tensor, sign: f32) -> Result<Tensor> {
        let x = cuda.resident(x, DType::Bf16)?;
        let table = self.table.resident(cuda)?;
        let y = cuda.alloc(DType::Bf16, x.len())?;
        let (tokens, half) = (x.matrix_dims().0, self.table.head_dim / 2);
        let args = [
            Arg::from(&y),
            x.arg()?,
            table.arg()?,
            Arg::U64(tokens as u64),
            Arg::size(Self::NAME, self.heads)?,
            Arg::size(Self::NAME, half)?,
            Arg::size(Self::NAME, self.seq_len)?,
            Arg::size(Self::NAME, self.start)?,
            Arg::F32(sign),
        ];
        let blocks = (tokens * half.div_ceil(WIDE_F32)).div_ceil(THREADS as usize);
        // SAFETY: x and y are whole heads of bf16, and `check` has seen that the f32 table holds
        // every position; threads stride over all pairs, so that any number of them will do.
        unsafe { cuda.launch(ROTATE, Grid::of_blocks(blocks, THREADS, 0), &args) }?;
        Tensor::from_cuda(y, x.shape())
    }
}
