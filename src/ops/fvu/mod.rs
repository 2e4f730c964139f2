//! Fraction of variance unexplained: Σ‖X − X̂‖² / Σ‖X − mean(X)‖², sums over all tokens. Each
//! row is summed in f32, rows in f64 in a fixed order.

mod cuda;

use rayon::prelude::*;

use super::math::squared_distance;
use super::{Operator, expect_inputs, expect_shape, only_grad};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

/// Rows of one task; fixed, so that sums do not depend on the number of threads.
const ROW_BLOCK: usize = 64;
/// A token is a sink when its norm reaches this multiple of the batch's median norm.
const SINK_FACTOR: f32 = 10.0;

/// Input: x̂ \[T, d\]. Output: the scalar Σ‖target − x̂‖² / variance, shape \[1\], in host memory.
/// On CUDA the target and x̂ are f32 or bf16 there, and the gradient is bf16.
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
        let variance = total_variance(device, x, None)?;
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
    const CUDA: bool = true;

    fn forward(
        &self,
        device: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let [x_hat] = expect_inputs(Self::NAME, inputs)?;
        let error = squared_error(device, &self.target, x_hat, None)?;
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
        let grad = match device {
            Device::Cuda(cuda) => cuda::difference(cuda, &x_hat, &self.target, scale, DType::Bf16)?,
            Device::Cpu(_) => scaled_difference(device, &x_hat, &self.target, scale)?,
        };
        Ok(vec![Some(grad)])
    }
}

/// x − y in f32, both \[T, d\]: what a reconstruction leaves.
pub fn residual(device: &Device, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    match device {
        Device::Cuda(cuda) => cuda::difference(cuda, x, y, 1.0, DType::F32),
        Device::Cpu(_) => scaled_difference(device, x, y, 1.0),
    }
}

fn scaled_difference(device: &Device, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
    const CHUNK: usize = 1 << 14;
    expect_shape(Fvu::NAME, y, x.shape())?;
    let mut out = device.buffer(x.len());
    out.par_chunks_mut(CHUNK)
        .zip(x.f32s()?.par_chunks(CHUNK))
        .zip(y.f32s()?.par_chunks(CHUNK))
        .for_each(|((out, x), y)| {
            for ((o, x), y) in out.iter_mut().zip(x).zip(y) {
                *o = scale * (x - y);
            }
        });
    Tensor::from_buffer(out, x.shape())
}

/// The tokens whose norm is at least ten times the median norm (the lower median, for an even
/// number).
#[derive(Clone, Debug)]
pub struct Sinks {
    /// \[T\] f32: 0 for a sink, else 1.
    keep: Tensor,
    /// \[T\] u32: the tokens that are no sinks, ascending, then others.
    order: Tensor,
    kept: usize,
}

impl Sinks {
    /// Finds them in `x` \[T, d\].
    pub fn of(device: &Device, x: &Tensor) -> Result<Self> {
        let (tokens, d) = x.matrix_dims();
        if tokens == 0 || d == 0 {
            return Self::none(tokens);
        }
        if let Device::Cuda(cuda) = device {
            return cuda::sinks(cuda, x);
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
        Self::from_marks(norms.iter().map(|&n| n >= limit && n > 0.0).collect())
    }

    /// No sink among `tokens` tokens.
    pub fn none(tokens: usize) -> Result<Self> {
        Self::from_marks(vec![false; tokens])
    }

    /// The tokens that are marked.
    fn from_marks(marks: Vec<bool>) -> Result<Self> {
        let tokens = marks.len();
        let keep = marks.iter().map(|&sink| f32::from(u8::from(!sink)));
        let of = |sink: bool| (0u32..).zip(&marks).filter(move |&(_, &m)| m == sink);
        let order: Vec<u32> = of(false).chain(of(true)).map(|(t, _)| t).collect();
        Ok(Self {
            keep: Tensor::from_vec(keep.collect(), [tokens])?,
            order: Tensor::from_u32(order, [tokens])?,
            kept: of(false).count(),
        })
    }

    /// How many tokens are none.
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// Whether there is any.
    pub fn any(&self) -> bool {
        self.kept < self.keep.len()
    }

    /// For each token, whether it is one.
    pub fn marks(&self) -> Result<Vec<bool>> {
        let keep = self.keep.to_f32()?;
        Ok(keep.f32s()?.iter().map(|&k| k == 0.0).collect())
    }

    /// The rows of `x` \[T, d\] that are none.
    pub fn without(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        self.expect_tokens(x)?;
        if let Device::Cuda(cuda) = device {
            return cuda::without(cuda, x, self);
        }
        let (_, d) = x.matrix_dims();
        let (x, order) = (x.f32s()?, self.order.u32s()?);
        let rows = order[..self.kept]
            .iter()
            .map(|&t| &x[t as usize * d..][..d]);
        Tensor::from_vec(rows.flatten().copied().collect(), [self.kept, d])
    }

    fn expect_tokens(&self, x: &Tensor) -> Result<()> {
        let (tokens, _) = x.matrix_dims();
        if self.keep.len() == tokens {
            return Ok(());
        }
        let expected = format!("sinks among {tokens} tokens");
        let got = format!("{}", self.keep.len());
        Err(Error::operand(Fvu::NAME, expected, got))
    }
}

/// FVU over the tokens that are no sinks, without gradient; `None` where their variance is zero.
pub fn fvu_without(
    device: &Device,
    x: &Tensor,
    x_hat: &Tensor,
    sinks: &Sinks,
) -> Result<Option<f64>> {
    sinks.expect_tokens(x)?;
    let variance = total_variance(device, x, Some(sinks))?;
    let error = squared_error(device, x, x_hat, Some(sinks))?;
    Ok((variance > 0.0).then(|| error / variance))
}

/// Mean over all elements of (x − x̂)² for each of `parts` parts of as many tokens, in their
/// order; NaN where there are none.
///
/// # Errors
/// A number of tokens that cannot be parted so.
pub fn mse(device: &Device, x: &Tensor, x_hat: &Tensor, parts: usize) -> Result<Vec<f64>> {
    let (all, d) = x.matrix_dims();
    if parts == 0 || !all.is_multiple_of(parts) {
        let expected = format!("tokens for {parts} equal parts");
        return Err(Error::operand(Fvu::NAME, expected, format!("{all}")));
    }
    let tokens = all / parts;
    if tokens == 0 || d == 0 {
        return Ok(vec![f64::NAN; parts]);
    }
    let sums = match device {
        Device::Cuda(cuda) => cuda::squared_errors(cuda, x, x_hat, tokens)?,
        Device::Cpu(_) => {
            let part = |p| move |t: usize| t / tokens == p;
            let sum = |p| host_squared_error(x, x_hat, part(p));
            (0..parts).map(sum).collect::<Result<_>>()?
        }
    };
    let mean = |sum: f64| sum / (tokens * d) as f64;
    Ok(sums.into_iter().map(mean).collect())
}

/// Mean over tokens of `x` \[T, d\]; zeros where T is 0.
pub fn token_mean(device: &Device, x: &Tensor) -> Result<Tensor> {
    if let Device::Cuda(cuda) = device {
        return cuda::token_mean(cuda, x);
    }
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

/// Σ‖x_t − mean‖² over the tokens that are no sinks; all where `None`.
fn total_variance(device: &Device, x: &Tensor, sinks: Option<&Sinks>) -> Result<f64> {
    if let Device::Cuda(cuda) = device {
        return cuda::total_variance(cuda, x, sinks);
    }
    let keep = keep(sinks)?;
    let mean = mean_of(x, &keep)?;
    sum_rows(
        x,
        keep,
        #[inline(always)]
        |row, _| squared_distance(row, &mean),
    )
}

/// Σ‖x_t − y_t‖² over the tokens that are no sinks; all where `None`.
fn squared_error(device: &Device, x: &Tensor, y: &Tensor, sinks: Option<&Sinks>) -> Result<f64> {
    if let Device::Cuda(cuda) = device {
        return cuda::squared_error(cuda, x, y, sinks);
    }
    host_squared_error(x, y, keep(sinks)?)
}

fn host_squared_error(x: &Tensor, y: &Tensor, keep: impl Fn(usize) -> bool + Sync) -> Result<f64> {
    expect_shape(Fvu::NAME, y, x.shape())?;
    let y = y.f32s()?;
    sum_rows(
        x,
        keep,
        #[inline(always)]
        |row, t| squared_distance(row, &y[t * row.len()..][..row.len()]),
    )
}

/// Whether a token counts.
fn keep(sinks: Option<&Sinks>) -> Result<impl Fn(usize) -> bool + Sync> {
    let keep = sinks.map(|sinks| sinks.keep.f32s()).transpose()?;
    Ok(move |t: usize| keep.is_none_or(|keep| keep[t] != 0.0))
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
