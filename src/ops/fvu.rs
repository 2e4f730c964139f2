//! Fraction of variance unexplained: Σ‖X − X̂‖² / Σ‖X − mean(X)‖², sums over all tokens. Each
//! row is summed in f32, rows in f64 in a fixed order.

use rayon::prelude::*;

use super::math::squared_distance;
use super::{Operator, expect_inputs, expect_shape, only_grad};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Rows of one task; fixed, so that sums do not depend on the number of threads.
const ROW_BLOCK: usize = 64;
/// A token is a sink when its norm reaches this multiple of the batch's median norm.
const SINK_FACTOR: f32 = 10.0;

/// Input: x̂ \[T, d\]. Output: the scalar Σ‖target − x̂‖² / variance, shape \[1\].
///
/// With [`Fvu::new`] that is the fraction of variance unexplained. AuxK takes the residual as
/// the target and the variance of X (Gao et al. 2024, scaled as in sparsify).
pub struct Fvu {
    target: Tensor,
    variance: f64,
}

impl Fvu {
    /// Against the variance of `x` \[T, d\] about its mean over tokens. An error when that is
    /// zero (all tokens equal, or none) or not finite.
    pub fn new(device: &Device, x: &Tensor) -> Result<Self> {
        let variance = match device {
            Device::Cuda(cuda) => return Err(cuda.no_kernel(Self::NAME)),
            Device::Cpu(_) => total_variance(x, |_| true)?,
        };
        Self::with_variance(x.clone(), variance)
    }

    /// Against a variance that is known already; an error unless it is positive and finite.
    pub fn with_variance(target: Tensor, variance: f64) -> Result<Self> {
        if !variance.is_finite() {
            return Err(Error::NotFinite {
                what: format!("fvu: the activations' variance is {variance}"),
            });
        }
        if variance <= 0.0 {
            let got = "a total variance of zero";
            return Err(Error::operand(Self::NAME, "tokens that differ", got));
        }
        Ok(Self { target, variance })
    }

    /// The total variance that the squared error is divided by.
    pub fn variance(&self) -> f64 {
        self.variance
    }
}

impl Operator for Fvu {
    type Saved = Tensor;
    const NAME: &'static str = "fvu";

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [x_hat] = expect_inputs(Self::NAME, inputs)?;
        let error = match device {
            Device::Cuda(cuda) => return Err(cuda.no_kernel(Self::NAME)),
            Device::Cpu(_) => squared_error(&self.target, x_hat, |_| true)?,
        };
        let fvu = Tensor::from_vec(vec![(error / self.variance) as f32], [1])?;
        Ok((vec![fvu], x_hat.clone()))
    }

    fn backward(
        &self,
        device: &Device,
        x_hat: Tensor,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let upstream = only_grad(Self::NAME, grads)?.f32s()?[0];
        let scale = (2.0 * f64::from(upstream) / self.variance) as f32;
        let mut grad = device.buffer(x_hat.len());
        let (x, y) = (self.target.f32s()?, x_hat.f32s()?);
        match device {
            Device::Cuda(cuda) => return Err(cuda.no_kernel(Self::NAME)),
            Device::Cpu(_) => grad
                .par_chunks_mut(1 << 14)
                .zip(x.par_chunks(1 << 14))
                .zip(y.par_chunks(1 << 14))
                .for_each(|((grad, x), y)| {
                    for ((g, x), y) in grad.iter_mut().zip(x).zip(y) {
                        *g = scale * (y - x);
                    }
                }),
        }
        Ok(vec![Some(Tensor::from_buffer(grad, x_hat.shape())?)])
    }
}

/// For each token of `x` \[T, d\], whether it is a sink: its norm is at least ten times the
/// median norm (the lower median, for an even number).
pub fn sinks(x: &Tensor) -> Result<Vec<bool>> {
    let (tokens, d) = x.matrix_dims();
    if tokens == 0 || d == 0 {
        return Ok(vec![false; tokens]);
    }
    let origin = vec![0.0; d];
    let rows = x.f32s()?.par_chunks(d);
    let norms: Vec<f32> = rows
        .map(|row| vectorized!(squared_distance(row, &origin)).sqrt())
        .collect();
    let mut sorted = norms.clone();
    let (_, &mut median, _) =
        sorted.select_nth_unstable_by((tokens - 1) / 2, |a, b| a.total_cmp(b));
    let limit = SINK_FACTOR * median;
    Ok(norms.iter().map(|&n| n >= limit && n > 0.0).collect())
}

/// FVU over the tokens that `skip` leaves, without gradient; `None` where their variance is zero.
pub fn fvu_without(x: &Tensor, x_hat: &Tensor, skip: &[bool]) -> Result<Option<f64>> {
    let (tokens, _) = x.matrix_dims();
    if skip.len() != tokens {
        let expected = format!("a mark for each of {tokens} tokens");
        return Err(Error::operand("fvu", expected, format!("{}", skip.len())));
    }
    let variance = total_variance(x, |t| !skip[t])?;
    let error = squared_error(x, x_hat, |t| !skip[t])?;
    Ok((variance > 0.0).then(|| error / variance))
}

/// Mean over all elements of (x − x̂)²; `None` for empty tensors.
pub fn mse(x: &Tensor, x_hat: &Tensor) -> Result<Option<f64>> {
    let error = squared_error(x, x_hat, |_| true)?;
    Ok((!x.is_empty()).then(|| error / x.len() as f64))
}

/// Mean over tokens of `x` \[T, d\]; zeros where T is 0.
pub fn token_mean(x: &Tensor) -> Result<Tensor> {
    let (_, d) = x.matrix_dims();
    Tensor::from_vec(mean_of(x, |_| true)?, [d])
}

fn mean_of(x: &Tensor, keep: impl Fn(usize) -> bool + Sync) -> Result<Vec<f32>> {
    let (_, d) = x.matrix_dims();
    let partial: Vec<(usize, Vec<f64>)> = x
        .f32s()?
        .par_chunks(ROW_BLOCK * d.max(1))
        .enumerate()
        .map(|(block, rows)| {
            let (mut n, mut sum) = (0, vec![0.0f64; d]);
            vectorized!({
                for (r, row) in rows.chunks_exact(d.max(1)).enumerate() {
                    if keep(block * ROW_BLOCK + r) {
                        n += 1;
                        for (s, &v) in sum.iter_mut().zip(row) {
                            *s += f64::from(v);
                        }
                    }
                }
            });
            (n, sum)
        })
        .collect();
    let n = partial.iter().map(|(n, _)| n).sum::<usize>().max(1) as f64;
    let column = |c: usize| partial.iter().map(|(_, sum)| sum[c]).sum::<f64>() / n;
    Ok((0..d).map(|c| column(c) as f32).collect())
}

fn total_variance(x: &Tensor, keep: impl Fn(usize) -> bool + Sync) -> Result<f64> {
    let mean = mean_of(x, &keep)?;
    sum_rows(
        x,
        keep,
        #[inline(always)]
        |row, _| squared_distance(row, &mean),
    )
}

fn squared_error(x: &Tensor, y: &Tensor, keep: impl Fn(usize) -> bool + Sync) -> Result<f64> {
    expect_shape(Fvu::NAME, y, x.shape())?;
    let y = y.f32s()?;
    sum_rows(
        x,
        keep,
        #[inline(always)]
        |row, t| squared_distance(row, &y[t * row.len()..][..row.len()]),
    )
}

/// Σ_t f(row t, t) over the tokens to keep, in f64.
fn sum_rows(
    x: &Tensor,
    keep: impl Fn(usize) -> bool + Sync,
    f: impl Fn(&[f32], usize) -> f32 + Sync,
) -> Result<f64> {
    let d = x.matrix_dims().1.max(1);
    let partial: Vec<f64> = x
        .f32s()?
        .par_chunks(ROW_BLOCK * d)
        .enumerate()
        .map(|(block, rows)| {
            vectorized!({
                let mut sum = 0.0;
                for (r, row) in rows.chunks_exact(d).enumerate() {
                    let t = block * ROW_BLOCK + r;
                    if keep(t) {
                        sum += f64::from(f(row, t));
                    }
                }
                sum
            })
        })
        .collect();
    Ok(partial.iter().sum())
}
