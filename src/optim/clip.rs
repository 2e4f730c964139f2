use rayon::prelude::*;

use super::multi_tensor::{Slot, Table, address, blocks};
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Scales all gradients so that their common norm is at most `max_norm`; the norm before. As
/// PyTorch's `clip_grad_norm_`, the divisor is the norm plus 1e-6. On a GPU the gradients are
/// f32 in its memory afterwards.
pub fn clip_grad_norm(device: &Device, grads: &mut [&mut Tensor], max_norm: f64) -> Result<f64> {
    match device {
        Device::Cpu(_) => clip_on_cpu(grads, max_norm),
        Device::Cuda(cuda) => clip_on_cuda(cuda, grads, max_norm),
    }
}

/// What gradients of the common norm `norm` are multiplied by, where it exceeds the limit.
fn factor(norm: f64, max_norm: f64) -> Option<f32> {
    Some((max_norm / (norm + 1e-6)) as f32).filter(|&factor| factor < 1.0)
}

fn clip_on_cpu(grads: &mut [&mut Tensor], max_norm: f64) -> Result<f64> {
    /// Values of a task. Tasks are of all gradients at once, as many are small.
    const CHUNK: usize = 1 << 14;
    let mut chunks = Vec::new();
    for grad in grads.iter() {
        chunks.extend(grad.f32s()?.chunks(CHUNK));
    }
    // In float64, and added up in order, so that the norm does not depend on the number of threads.
    let squares = |chunk: &[f32]| -> f64 { chunk.iter().map(|&v| f64::from(v).powi(2)).sum() };
    let partial: Vec<f64> = chunks.into_par_iter().map(squares).collect();
    let norm = partial.iter().sum::<f64>().sqrt();
    if let Some(factor) = factor(norm, max_norm) {
        let mut chunks = Vec::new();
        for grad in grads.iter_mut() {
            chunks.extend(grad.f32s_mut()?.chunks_mut(CHUNK));
        }
        let scale = |chunk: &mut [f32]| chunk.iter_mut().for_each(|g| *g *= factor);
        chunks.into_par_iter().for_each(scale);
    }
    Ok(norm)
}

const fn kernel(function: &'static str) -> Kernel {
    Kernel {
        stem: "clip",
        function,
    }
}
const SQUARES: Kernel = kernel("clip_squares_f32");
const TOTAL: Kernel = kernel("clip_total_f64");
const SCALE: Kernel = kernel("clip_scale_f32");

fn clip_on_cuda(cuda: &CudaDevice, grads: &mut [&mut Tensor], max_norm: f64) -> Result<f64> {
    let mut slots = Vec::with_capacity(grads.len());
    for grad in grads.iter_mut() {
        cuda.own(grad)?;
        slots.push(Slot {
            pointers: [address(grad), 0, 0, 0],
            len: grad.len(),
            row: 0,
        });
    }
    let mut table = Table::default();
    let norm = norm_on_cuda(cuda, &mut table, &slots)?;
    if let Some(factor) = factor(norm, max_norm) {
        let args = [Arg::F32(factor)];
        // SAFETY: the slots are f32 tensors of this device that nobody shares.
        unsafe { table.launch(cuda, SCALE, &slots, None, &args) }?;
    }
    Ok(norm)
}

/// A float64 takes two u32 of a buffer.
const WORDS: usize = 2;

fn norm_on_cuda(cuda: &CudaDevice, table: &mut Table, slots: &[Slot]) -> Result<f64> {
    let count = blocks(slots);
    let sums = cuda.alloc(DType::U32, WORDS * count)?;
    let total = cuda.alloc(DType::U32, WORDS)?;
    // SAFETY: the slots are f32 tensors of this device, and each block has a float64 in `sums`.
    unsafe { table.launch(cuda, SQUARES, slots, Some(Arg::from(&sums)), &[]) }?;
    let args = [
        Arg::from(&total),
        Arg::from(&sums),
        Arg::size("clip", count)?,
    ];
    // SAFETY: `total` is one float64, `sums` are `count`.
    unsafe { cuda.launch(TOTAL, Grid::of_blocks(1, 256, 0), &args) }?;
    let bytes = total.read(0, WORDS)?.try_into();
    let bytes = bytes.map_err(|_| Error::operand("clip", "8 bytes", "another number"))?;
    Ok(f64::from_le_bytes(bytes).sqrt())
}
