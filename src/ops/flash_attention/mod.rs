//! Causal grouped-query attention, blocked, after FlashAttention-2 (Dao 2023, arXiv
//! 2307.08691) with the online softmax of Milakov and Gimelshein (arXiv 1805.02867):
//! O = softmax(Q K^T / sqrt(D)) V for each head, where row i of a sequence sees keys
//! start_i <= j <= i (start_i = 0 without a document mask).
//!
//! q, o: [T, heads * D]; k, v: [T, kv_heads * D], f32, bf16 on CUDA; on the CPU products are computed
//! in the device's precision, f32 or bf16 with sums in f32, and o is of that type;
//! T = batch * seq_len; query head h reads key/value head h / (heads / kv_heads). Saved: q, k, v, o
//! and, for each row and head, the base-2 logarithm of the softmax's denominator. Backward recomputes the scores: with
//! P = softmax, dP = dO V^T and dS = P (dP - rowsum(dO O)),
//! dV = P^T dO, dQ = dS K / sqrt(D), dK = dS^T Q / sqrt(D).
//!
//! Least work for each head and sequence of n rows: 2 n^2 D FLOP forward, 5 n^2 D backward; on CUDA
//! 7 n^2 D, as dQ and dK, dV are found in two passes, each parallel without shared sums.

mod backward;
mod cpu;
mod cuda;
mod softmax;

use cpu::Arithmetic;
use half::bf16;

use super::{Operator, expect_inputs, expect_shape, only_grad};
use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Causal attention within sequences of `seq_len` rows: inputs q, k and v, one output.
pub struct FlashAttention {
    /// Number of sequences.
    pub batch: usize,
    /// Rows of a sequence.
    pub seq_len: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// \[T\] u32: for each row the position within its sequence where its document starts; a row
    /// sees nothing before it. Without it a row sees its whole past.
    pub doc_starts: Option<Tensor>,
}

/// What [`FlashAttention`] keeps for backward.
pub struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    /// log2 Σ_j 2^(log2(e) s_j) over the visible scores s_j of each row and head: [T, heads],
    /// on CUDA [batch * heads, seq_len] f32.
    log_sum: Tensor,
}

impl FlashAttention {
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) || self.heads == 0 {
            return Err(Error::operand(
                Self::NAME,
                "query heads in a multiple of the key/value heads",
                format!("{} and {}", self.heads, self.kv_heads),
            ));
        }
        let rows = self.batch * self.seq_len;
        expect_shape(Self::NAME, q, &[rows, self.heads * self.head_dim])?;
        expect_shape(Self::NAME, k, &[rows, self.kv_heads * self.head_dim])?;
        expect_shape(Self::NAME, v, &[rows, self.kv_heads * self.head_dim])?;
        if self.head_dim == 0 || self.seq_len == 0 {
            return Err(Error::operand(
                Self::NAME,
                "a head size and a sequence length above 0",
                format!("{} and {}", self.head_dim, self.seq_len),
            ));
        }
        let documents = self.doc_starts.as_ref();
        documents.map_or(Ok(()), |starts| check_documents(starts, rows, self.seq_len))
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// On the CPU, with an output of elements T.
    fn forward_host<T: Arithmetic>(
        &self,
        device: &Device,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Vec<Tensor>, Saved)> {
        let mut o = device.buffer(q.len());
        let rows = self.batch * self.seq_len;
        let mut log_sum = device.buffer(rows * self.heads);
        let operands = cpu::Operands::new(device, self, q, k, v)?;
        cpu::forward::<T>(device, &operands, &mut o, &mut log_sum);
        let o = T::into_tensor(o, q.shape())?;
        let saved = Saved {
            q: q.clone(),
            k: k.clone(),
            v: v.clone(),
            o: o.clone(),
            log_sum: Tensor::from_buffer(log_sum, [rows, self.heads])?,
        };
        Ok((vec![o], saved))
    }
}

/// Whether `starts` says for each of `rows` rows, in sequences of `seq_len`, where its document
/// begins.
///
/// # Errors
/// Another number of rows, a start beyond its row.
pub(crate) fn check_documents(starts: &Tensor, rows: usize, seq_len: usize) -> Result<()> {
    const NAME: &str = FlashAttention::NAME;
    expect_shape(NAME, starts, &[rows])?;
    if starts.cuda().is_some() {
        // Whoever put them there has checked them; reading them back would stop the device.
        return Ok(());
    }
    for (row, &start) in starts.u32s()?.iter().enumerate() {
        let position = row % seq_len;
        if start as usize > position {
            return Err(Error::operand(
                NAME,
                format!("a document start of row {row} at or before its position {position}"),
                format!("{start}"),
            ));
        }
    }
    Ok(())
}

impl Operator for FlashAttention {
    type Saved = Saved;
    const NAME: &'static str = "flash_attention";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Saved)> {
        let [q, k, v] = expect_inputs(Self::NAME, inputs)?;
        self.check(q, k, v)?;
        if let Device::Cuda(cuda) = device {
            return self.forward_cuda(cuda, q, k, v);
        }
        match device.precision() {
            Precision::F32 => self.forward_host::<f32>(device, q, k, v),
            Precision::Bf16 => self.forward_host::<bf16>(device, q, k, v),
        }
    }

    fn backward(
        &self,
        device: &Device,
        saved: Saved,
        grads: Vec<Option<Tensor>>,
        needed: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let grad = only_grad(Self::NAME, grads)?;
        let Saved { q, k, v, .. } = &saved;
        expect_shape(Self::NAME, &grad, q.shape())?;
        if let Device::Cuda(cuda) = device {
            return self.backward_cuda(cuda, &saved, &grad, needed);
        }
        let operands = cpu::Operands::new(device, self, q, k, v)?;
        let backward = match device.precision() {
            Precision::F32 => cpu::backward::<f32>,
            Precision::Bf16 => cpu::backward::<bf16>,
        };
        let grads = backward(device, &operands, &saved.o, &grad, &saved.log_sum)?;
        let inputs = grads.into_iter().zip([q, k, v]).zip(needed);
        inputs
            .map(|((grad, input), &needed)| {
                let grad = needed.then(|| Tensor::from_buffer(grad, input.shape()));
                grad.transpose()
            })
            .collect()
    }
}
