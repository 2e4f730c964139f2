//! Head, softmax, Kullback-Leibler divergence and its gradient, fused over chunks of tokens:
//! loss_t = KL(softmax(h'_t Wᵀ) ‖ softmax(h_t Wᵀ)).
//!
//! h' (teacher) and h (student) \[T, d\] f32 or bf16 after the final norm, W \[V, d\]. The gradient
//! (q − p) W with respect to h is computed in the same sweep over the chunks and is all that is
//! saved, so that logits never exist for all tokens. Two products a chunk forward (teacher and
//! student rows stacked in one), one for the gradient, which in bf16 on the CPU serves a group of
//! chunks. On CUDA hidden states, W and the gradient are bf16, logits, statistics, losses and the
//! gradient that is saved f32.

use half::bf16;
use rayon::prelude::*;

use crate::device::cuda::{Arg, Grid, Kernel};
use crate::device::simd::{CACHE_LINE, Fetch, prefetch, vectorized};
use crate::device::{CudaDevice, Device, Precision};
use crate::error::Result;
use crate::ops::gemm::{Left, Product, Values};
use crate::ops::head::CudaHead;
use crate::ops::math::{LANES, add_up, exp_of_negative};
use crate::ops::stored::Stored;
use crate::ops::{Operator, expect_cols, expect_inputs, expect_shape, head, only_grad};
use crate::tensor::{Buffer, DType, Tensor};

/// Input: the student's hidden states \[T, d\]. Output: the divergence of each token \[T\].
pub struct KlDiv {
    /// h' \[T, d\]
    pub teacher: Tensor,
    /// W \[V, d\]
    pub head: Tensor,
}

impl Operator for KlDiv {
    /// The input's gradient for gradients of 1.
    type Saved = Option<Tensor>;
    const NAME: &'static str = "kl_div";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [student] = expect_inputs(Self::NAME, inputs)?;
        expect_shape(Self::NAME, &self.teacher, student.shape())?;
        let (tokens, d) = student.matrix_dims();
        expect_cols(Self::NAME, &self.head, d)?;
        if let Device::Cuda(cuda) = device {
            return self.forward_cuda(cuda, student, needed[0]);
        }
        let grad = needed[0].then(|| device.buffer(tokens * d));
        let (losses, grad) = self.forward_host(device, student, grad)?;
        let grad = grad
            .map(|g| Tensor::from_buffer(g, student.shape()))
            .transpose()?;
        Ok((vec![Tensor::from_vec(losses, [tokens])?], grad))
    }

    fn backward(
        &self,
        device: &Device,
        saved: Self::Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let Some(mut saved) = saved else {
            return Ok(vec![None]);
        };
        let grad = only_grad(Self::NAME, grads)?;
        let (tokens, d) = saved.matrix_dims();
        expect_shape(Self::NAME, &grad, &[tokens])?;
        if let Device::Cuda(cuda) = device {
            return Ok(vec![Some(backward_cuda(cuda, &saved, &grad)?)]);
        }
        let rows = saved.f32s_mut()?.par_chunks_mut(d.max(1));
        rows.zip(grad.f32s()?)
            .for_each(|(row, &grad)| row.iter_mut().for_each(|v| *v *= grad));
        Ok(vec![Some(saved)])
    }
}

impl KlDiv {
    /// The divergence of each token of the `student`, and `grad` filled. Logits exist for a chunk
    /// of tokens at a time. Their gradients take their place, and in bf16 are kept, rounded as the
    /// product would, for a group of chunks.
    fn forward_host(
        &self,
        device: &Device,
        student: &Tensor,
        mut grad: Option<Buffer>,
    ) -> Result<(Vec<f32>, Option<Buffer>)> {
        let ((tokens, d), (vocab, _)) = (student.matrix_dims(), self.head.matrix_dims());
        let kept = device.precision() == Precision::Bf16 && grad.is_some();
        let [chunk, group] = match kept {
            true => head::chunk_and_group(tokens, vocab),
            false => [head::chunk_tokens(tokens, vocab, 2); 2],
        };
        let mut logits = device.buffer(2 * chunk * vocab);
        let mut stacked = device.buffer(2 * chunk * d);
        let mut rounded = device.buffer::<bf16>(if kept { group * vocab } else { 0 });
        let mut losses = Vec::with_capacity(tokens);
        for from in (0..tokens).step_by(group) {
            let end = tokens.min(from + group);
            for first in (from..end).step_by(chunk) {
                let n = chunk.min(end - first);
                let stacked = &mut stacked[..2 * n * d];
                let (of_teacher, of_student) = stacked.split_at_mut(n * d);
                self.teacher.read_f32(first * d, of_teacher)?;
                student.read_f32(first * d, of_student)?;
                let logits = &mut logits[..2 * n * vocab];
                let left = Left::new(Values::F32(stacked), d)?;
                Product::new(&left, &self.head).nt(device, logits)?;
                let (p, q) = logits.split_at_mut(n * vocab);
                let rows = p.par_chunks_mut(vocab).zip(q.par_chunks_mut(vocab));
                if kept {
                    let rounded = rounded[(first - from) * vocab..].par_chunks_mut(vocab);
                    losses.par_extend(rows.zip(rounded).map(|((p, q), rounded)| {
                        let (loss, scales) = divergence(p, q);
                        vectorized!(round_difference(rounded, p, q, scales));
                        loss
                    }));
                } else {
                    losses.par_extend(rows.map(|(p, q)| {
                        let (loss, scales) = divergence(p, q);
                        if grad.is_some() {
                            vectorized!(subtract(p, q, scales));
                        }
                        loss
                    }));
                }
            }
            if let Some(grad) = &mut grad {
                let n = end - from;
                let of_logits = match kept {
                    true => Values::Bf16(&rounded[..n * vocab]),
                    false => Values::F32(&logits[n * vocab..][..n * vocab]),
                };
                let left = Left::new(of_logits, vocab)?;
                let grad = &mut grad[from * d..][..n * d];
                Product::new(&left, &self.head).nn(device, grad)?;
            }
        }
        Ok((losses, grad))
    }
}

/// KL(softmax(p) ‖ softmax(q)) of two rows of logits, which become their exponentials, and by what
/// to multiply these to make them probabilities.
fn divergence(p: &mut [f32], q: &mut [f32]) -> (f32, [f32; 2]) {
    let shifts = [&*p, &*q].map(|row| vectorized!(head::max(row)));
    let [of_p, of_q, weighted] = vectorized!(exponentials(p, q, shifts));
    // Σ p (log p − log q), where log p = logit − shift − log of_p.
    let loss = f64::from(weighted) / f64::from(of_p) + (f64::from(of_q) / f64::from(of_p)).ln();
    (loss as f32, [of_p, of_q].map(f32::recip))
}

/// Replaces p by e^(p − its shift), q likewise. Sums of these, and of the new p times the difference
/// of the shifted logits. The rows that follow in memory are asked for: they are next.
#[inline(always)]
fn exponentials(p: &mut [f32], q: &mut [f32], [shift_p, shift_q]: [f32; 2]) -> [f32; 3] {
    let vocab = p.len();
    let (p, p_rest) = p.as_chunks_mut::<LANES>();
    let (q, q_rest) = q.as_chunks_mut::<LANES>();
    let mut sums = [[0.0; LANES]; 3];
    let [of_p, of_q, weighted] = &mut sums;
    let mut add = |lane: usize, p: &mut f32, q: &mut f32| {
        let (log_p, log_q) = (*p - shift_p, *q - shift_q);
        (*p, *q) = (exp_of_negative(log_p), exp_of_negative(log_q));
        of_p[lane] += *p;
        of_q[lane] += *q;
        weighted[lane] += *p * (log_p - log_q);
    };
    for (p, q) in p.iter_mut().zip(q) {
        for next in [&*p, &*q].map(|row| row.as_ptr().wrapping_add(vocab)) {
            (0..LANES)
                .step_by(CACHE_LINE / size_of::<f32>())
                .for_each(|i| prefetch(next.wrapping_add(i), Fetch::L1));
        }
        for lane in 0..LANES {
            add(lane, &mut p[lane], &mut q[lane]);
        }
    }
    for (lane, (p, q)) in p_rest.iter_mut().zip(q_rest).enumerate() {
        add(lane, p, q);
    }
    sums.map(add_up)
}

/// q = softmax(q) − softmax(p) from exponentials.
#[inline(always)]
fn subtract(p: &[f32], q: &mut [f32], [by_p, by_q]: [f32; 2]) {
    for (p, q) in p.iter().zip(q) {
        *q = *q * by_q - p * by_p;
    }
}

/// The same rounded.
#[inline(always)]
fn round_difference(rounded: &mut [bf16], p: &[f32], q: &[f32], [by_p, by_q]: [f32; 2]) {
    for (rounded, (p, q)) in rounded.iter_mut().zip(p.iter().zip(q)) {
        *rounded = bf16::of(q * by_q - p * by_p);
    }
}

const FORWARD: Kernel = Kernel {
    stem: "kl_div",
    function: "kl_div_forward_f32",
};
const BACKWARD: Kernel = Kernel {
    stem: "kl_div",
    function: "kl_div_backward_bf16",
};
const FORWARD_THREADS: u32 = 512;
const BACKWARD_THREADS: u32 = 256;

impl KlDiv {
    fn forward_cuda(
        &self,
        cuda: &CudaDevice,
        student: &Tensor,
        needed: bool,
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        let (tokens, vocab) = (student.matrix_dims().0, self.head.matrix_dims().0);
        let resident = |t: &Tensor| cuda.resident(t, DType::Bf16);
        let hidden = [resident(&self.teacher)?, resident(student)?];
        let losses = Tensor::from_cuda(cuda.alloc(DType::F32, tokens)?, [tokens])?;
        let chunk = head::cuda_chunk_tokens(tokens, 2);
        let head = CudaHead::new(cuda, &self.head, [tokens, chunk, 2], needed)?;
        for first in (0..tokens).step_by(chunk) {
            let n = chunk.min(tokens - first);
            let args = [
                losses.arg()?,
                head.logits_gradient()?,
                head.logits(&stacked(cuda, &hidden, first, n)?)?,
                Arg::size(Self::NAME, first)?,
                Arg::size(Self::NAME, vocab)?,
            ];
            // SAFETY: logits are [2 n, vocab] f32 and their gradient, if any, [n, vocab] bf16;
            // the n losses from `first` on are among the `tokens` f32.
            unsafe { cuda.launch(FORWARD, Grid::of_blocks(n, FORWARD_THREADS, 0), &args) }?;
            head.set_gradient(first, n)?;
        }
        Ok((vec![losses], head.into_gradient(student.shape())?))
    }
}

/// Rows `first..first + n` of the teacher and then of the student, \[2 n, d\], so that one product
/// reads the head's weights once for both.
fn stacked(cuda: &CudaDevice, hidden: &[Tensor; 2], first: usize, n: usize) -> Result<Tensor> {
    let (_, d) = hidden[0].matrix_dims();
    let mut rows = cuda.alloc(DType::Bf16, 2 * n * d)?;
    for (i, from) in hidden.iter().filter_map(Tensor::cuda).enumerate() {
        rows.copy_from(i * n * d, from, first * d..(first + n) * d)?;
    }
    Tensor::from_cuda(rows, [2 * n, d])
}

/// The saved gradient times that of each token's loss, rounded to bf16.
fn backward_cuda(cuda: &CudaDevice, saved: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (tokens, d) = saved.matrix_dims();
    let grad = cuda.resident(grad, DType::F32)?;
    let dx = cuda.alloc(DType::Bf16, saved.len())?;
    let args = [
        Arg::from(&dx),
        saved.arg()?,
        grad.arg()?,
        Arg::size(KlDiv::NAME, d)?,
    ];
    let grid = Grid::of_blocks(tokens, BACKWARD_THREADS, 0);
    // SAFETY: dx and the saved gradient are [tokens, d], bf16 and f32; the losses' gradient is
    // [tokens] f32.
    unsafe { cuda.launch(BACKWARD, grid, &args) }?;
    Tensor::from_cuda(dx, saved.shape())
}
