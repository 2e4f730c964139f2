//! Head, softmax, cross-entropy and its gradient, fused over chunks of tokens:
//! loss = (1/n) Σ_t w_t (log Σ_v exp(l_tv) − l_t,y_t), l = h Wᵀ, where w_t is 1 for tokens that
//! count, else 0, and n their number; where no token counts, loss and gradient are 0.
//!
//! h \[T, d\] f32 or bf16 after the final norm, W \[V, d\], y \[T\] u32. As in kl_div, the gradient with
//! respect to h is computed in the same sweep and is all that is saved. Tokens that do not count
//! are left out of the products. On CUDA h, W and the gradient are bf16, logits, statistics and
//! the gradient that is saved f32; both outputs are on the host.

use rayon::prelude::*;

use crate::device::cuda::{Arg, Grid, Kernel};
use crate::device::simd::vectorized;
use crate::device::{CudaDevice, Device};
use crate::error::{Error, Result};
use crate::ops::embedding::Embedding;
use crate::ops::gemm::{Left, Product, Values};
use crate::ops::head::CudaHead;
use crate::ops::math::exp_of_negative;
use crate::ops::{Operator, expect_cols, expect_inputs, head, only_grad};
use crate::tensor::{DType, Tensor};

/// Input: hidden states \[T, d\]. Outputs: the mean loss \[1\]; the loss of each token \[T\], 0
/// for those that do not count (no gradient flows through it).
pub struct CrossEntropy {
    /// y: the token that should follow each position; `None` where the position does not count.
    pub targets: Vec<Option<u32>>,
    /// W \[V, d\]
    pub head: Tensor,
}

impl Operator for CrossEntropy {
    /// The input's gradient for a loss gradient of 1.
    type Saved = Option<Tensor>;
    const NAME: &'static str = "cross_entropy";
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        needed: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [hidden] = expect_inputs(Self::NAME, inputs)?;
        let ((tokens, d), (vocab, _)) = (hidden.matrix_dims(), self.head.matrix_dims());
        expect_cols(Self::NAME, &self.head, d)?;
        let counted = self.counted(tokens, vocab)?;
        if let Device::Cuda(cuda) = device {
            return self.forward_cuda(device, cuda, hidden, &counted, needed[0]);
        }
        let scale = 1.0 / counted.len().max(1) as f32;
        let chunk = head::chunk_tokens(counted.len(), vocab, 1);
        let mut logits = device.buffer(chunk * vocab);
        let (mut gathered, mut gathered_grad) =
            (device.buffer(chunk * d), device.buffer(chunk * d));
        let mut grad = needed[0].then(|| device.zeroed(tokens * d));
        let mut losses = vec![0.0; tokens];
        for counted in counted.chunks(chunk) {
            let n = counted.len();
            for (row, &(t, _)) in gathered.chunks_exact_mut(d).zip(counted) {
                hidden.read_f32(t * d, row)?;
            }
            let logits = &mut logits[..n * vocab];
            let left = Left::new(Values::F32(&gathered[..n * d]), d)?;
            Product::new(&left, &self.head).nt(device, logits)?;
            let rows = logits.par_chunks_mut(vocab).zip(counted);
            let terms: Vec<f32> = rows
                .map(|(row, &(_, y))| nll(row, y as usize, scale))
                .collect();
            counted
                .iter()
                .zip(terms)
                .for_each(|(&(t, _), loss)| losses[t] = loss);
            if let Some(grad) = &mut grad {
                let chunk_grad = &mut gathered_grad[..n * d];
                let left = Left::new(Values::F32(logits), vocab)?;
                Product::new(&left, &self.head).nn(device, chunk_grad)?;
                for (row, &(t, _)) in chunk_grad.chunks_exact(d).zip(counted) {
                    grad[t * d..][..d].copy_from_slice(row);
                }
            }
        }
        let grad = grad
            .map(|g| Tensor::from_buffer(g, hidden.shape()))
            .transpose()?;
        Ok((mean_and_each(losses, counted.len())?, grad))
    }

    fn backward(
        &self,
        device: &Device,
        saved: Self::Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        match (device, saved) {
            (Device::Cuda(cuda), Some(saved)) => {
                let grad = only_grad(Self::NAME, grads)?.to_f32()?.f32s()?[0];
                Ok(vec![Some(self.backward_cuda(cuda, &saved, grad)?)])
            }
            (_, saved) => scaled(saved, grads),
        }
    }
}

impl CrossEntropy {
    /// (position, target) of the tokens that count.
    fn counted(&self, tokens: usize, vocab: usize) -> Result<Vec<(usize, u32)>> {
        let counted: Vec<_> = self
            .targets
            .iter()
            .enumerate()
            .filter_map(|(t, y)| Some((t, (*y)?)))
            .collect();
        let invalid = counted.iter().find(|(_, y)| *y as usize >= vocab);
        if self.targets.len() != tokens || invalid.is_some() {
            return Err(Error::operand(
                Self::NAME,
                format!("{tokens} targets below {vocab}"),
                format!("{} targets, {invalid:?}", self.targets.len()),
            ));
        }
        Ok(counted)
    }
}

/// The outputs: the mean over `counted` tokens, and the loss of each.
fn mean_and_each(losses: Vec<f32>, counted: usize) -> Result<Vec<Tensor>> {
    let loss = losses.iter().map(|&v| f64::from(v)).sum::<f64>() / counted.max(1) as f64;
    if !loss.is_finite() {
        return Err(Error::NotFinite {
            what: format!("the cross-entropy is {loss}"),
        });
    }
    let tokens = losses.len();
    Ok(vec![
        Tensor::from_vec(vec![loss as f32], [1])?,
        Tensor::from_vec(losses, [tokens])?,
    ])
}

/// The saved gradient times that of the loss.
fn scaled(saved: Option<Tensor>, grads: Vec<Option<Tensor>>) -> Result<Vec<Option<Tensor>>> {
    let seed = only_grad(CrossEntropy::NAME, grads)?.f32s()?[0];
    let Some(mut grad) = saved else {
        return Ok(vec![None]);
    };
    if seed != 1.0 {
        grad.f32s_mut()?.iter_mut().for_each(|g| *g *= seed);
    }
    Ok(vec![Some(grad)])
}

/// −log softmax(row)[y]; the row becomes `scale` (softmax(row) − onehot(y)).
fn nll(row: &mut [f32], y: usize, scale: f32) -> f32 {
    let log_sum = head::log_sum_exp(row);
    let loss = log_sum - row[y];
    vectorized!(softmax_scaled(row, log_sum, scale));
    row[y] -= scale;
    loss
}

#[inline(always)]
fn softmax_scaled(row: &mut [f32], log_sum: f32, scale: f32) {
    row.iter_mut()
        .for_each(|v| *v = scale * exp_of_negative(*v - log_sum));
}

const FORWARD: Kernel = Kernel {
    stem: "cross_entropy",
    function: "cross_entropy_forward_f32",
};
const BACKWARD: Kernel = Kernel {
    stem: "cross_entropy",
    function: "cross_entropy_backward_bf16",
};
const FORWARD_THREADS: u32 = 512;
const BACKWARD_THREADS: u32 = 256;

impl CrossEntropy {
    /// What is saved has a row for each token that counts, \[n, d\] f32; one that is not read
    /// where none does.
    fn forward_cuda(
        &self,
        device: &Device,
        cuda: &CudaDevice,
        hidden: &Tensor,
        counted: &[(usize, u32)],
        needed: bool,
    ) -> Result<(Vec<Tensor>, Option<Tensor>)> {
        let ((tokens, d), (vocab, _)) = (hidden.matrix_dims(), self.head.matrix_dims());
        let hidden = cuda.resident(hidden, DType::Bf16)?.reshape([tokens, d])?;
        let n = counted.len();
        if n == 0 {
            let saved = Tensor::from_vec(vec![0.0; d], [1, d])?;
            let saved = needed.then(|| cuda.resident(&saved, DType::F32));
            return Ok((mean_and_each(vec![0.0; tokens], 0)?, saved.transpose()?));
        }
        let losses = Tensor::from_cuda(cuda.alloc(DType::F32, n)?, [n])?;
        let chunk = head::cuda_chunk_tokens(n, 1);
        let head = CudaHead::new(cuda, &self.head, [n, chunk, 1], needed)?;
        for (i, counted) in counted.chunks(chunk).enumerate() {
            let (first, n) = (i * chunk, counted.len());
            let targets = counted.iter().map(|&(_, y)| y).collect();
            let targets = cuda.resident(&Tensor::from_u32(targets, [n])?, DType::U32)?;
            let args = [
                losses.arg()?,
                head.logits_gradient()?,
                head.logits(&gathered(device, &hidden, counted)?)?,
                targets.arg()?,
                Arg::size(Self::NAME, first)?,
                Arg::size(Self::NAME, vocab)?,
                Arg::F32(1.0 / losses.len() as f32),
            ];
            // SAFETY: logits are [n, vocab] f32 and their gradient, if any, is as many bf16; the
            // n targets are below vocab (checked by `counted`), the n losses from `first` on
            // among those of all that count.
            unsafe { cuda.launch(FORWARD, Grid::of_blocks(n, FORWARD_THREADS, 0), &args) }?;
            head.set_gradient(first, n)?;
        }
        let mut each = vec![0.0; tokens];
        for (&(t, _), &loss) in counted.iter().zip(losses.to_f32()?.f32s()?) {
            each[t] = loss;
        }
        Ok((mean_and_each(each, n)?, head.into_gradient(&[n, d])?))
    }

    /// The saved gradient times that of the loss, rounded to bf16, and zero for the tokens that
    /// do not count.
    fn backward_cuda(&self, cuda: &CudaDevice, saved: &Tensor, grad: f32) -> Result<Tensor> {
        let (tokens, (_, d)) = (self.targets.len(), saved.matrix_dims());
        let mut next = 0..;
        let row_of = self.targets.iter().map(|y| y.and_then(|_| next.next()));
        let row_of = row_of.map(|row| row.unwrap_or(u32::MAX)).collect();
        let row_of = cuda.resident(&Tensor::from_u32(row_of, [tokens])?, DType::U32)?;
        let dx = cuda.alloc(DType::Bf16, tokens * d)?;
        let args = [
            Arg::from(&dx),
            saved.arg()?,
            row_of.arg()?,
            Arg::size(Self::NAME, d)?,
            Arg::F32(grad),
        ];
        let grid = Grid::of_blocks(tokens, BACKWARD_THREADS, 0);
        // SAFETY: dx is [tokens, d] bf16; the saved gradient is f32 and has a row of d values for
        // each token that counts, to which `row_of` numbers them in order.
        unsafe { cuda.launch(BACKWARD, grid, &args) }?;
        Tensor::from_cuda(dx, [tokens, d])
    }
}

/// The rows of the tokens that count, \[n, d\].
fn gathered(device: &Device, hidden: &Tensor, counted: &[(usize, u32)]) -> Result<Tensor> {
    let positions = counted.iter().map(|&(t, _)| u32::try_from(t));
    let positions = positions.collect::<std::result::Result<Vec<_>, _>>();
    let positions =
        positions.map_err(|_| Error::operand(CrossEntropy::NAME, "below 2^32 tokens", "more"))?;
    let ids = Tensor::from_u32(positions, [counted.len()])?;
    let (rows, _) = Embedding { ids }.forward(device, &[hidden], &[false])?;
    let rows = rows.into_iter().next();
    rows.ok_or_else(|| Error::operand(Embedding::NAME, "one output", "none"))
}
