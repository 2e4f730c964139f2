//! The loss of Stage I and its gradients.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::{Sae, reconstruct};
use crate::ops::Operator;
use crate::ops::fvu::{Fvu, residual};
use crate::ops::sparse_decode::SharedGroups;
use crate::ops::topk::TopK;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Weight of the reconstruction from 4k latents (Multi-TopK of Gao et al. 2024).
const MULTI_TOPK_WEIGHT: f32 = 1.0 / 8.0;

/// What forward and backward give.
pub(super) struct Pass {
    pub x_hat: Tensor,
    pub acts: Tensor,
    pub indices: Tensor,
    /// In the order of [`Sae::TENSORS`].
    pub grads: Vec<Tensor>,
    pub fvu: f64,
    pub auxk: Option<f64>,
    pub multi_topk_fvu: Option<f64>,
}

/// FVU of `x` \[T, d\], plus `auxk_alpha` times AuxK where some latents are `dead` (\[n\] u32,
/// ascending), plus Multi-TopK where the configuration has it; and the gradients of their sum.
pub(super) fn gradients(
    device: &Device,
    sae: &Sae,
    x: &Tensor,
    dead: Option<Tensor>,
    auxk_alpha: f32,
) -> Result<Pass> {
    let mut tape = Tape::new(device);
    let objective = Fvu::new(device, x)?;
    let variance = objective.variance();
    let parameters = sae.tensors().map(|t| tape.parameter(t.clone()));
    let input = Var::constant(x.clone());
    let k = sae.config.k;
    let encoder = |k| TopK::new(k, SharedGroups::default());
    let bias = &parameters[3];
    let main = reconstruct(&mut tape, &input, &parameters, encoder(k), bias)?;
    let loss = tape.apply(objective, &[&main.x_hat])?;
    let fvu = scalar(&loss)?;
    let mut terms = vec![(loss, 1.0)];

    let mut auxk = None;
    if let Some(dead) = dead.filter(|dead| !dead.is_empty()) {
        let k_aux = (sae.config.d_in / 2).max(1);
        let scale = (dead.len() as f32 / k_aux as f32).min(1.0);
        let target = residual(device, x, main.x_hat.value())?;
        let e_hat = reconstruct_dead(&mut tape, &input, &parameters, k_aux, dead)?;
        let loss = tape.apply(Fvu::with_variance(target, variance)?, &[&e_hat])?;
        auxk = Some(f64::from(scale) * scalar(&loss)?);
        terms.push((loss, scale * auxk_alpha));
    }

    let mut multi_topk_fvu = None;
    if sae.config.multi_topk {
        let wide = reconstruct(&mut tape, &input, &parameters, encoder(4 * k), bias)?;
        let loss = tape.apply(Fvu::with_variance(x.clone(), variance)?, &[&wide.x_hat])?;
        multi_topk_fvu = Some(scalar(&loss)?);
        terms.push((loss, MULTI_TOPK_WEIGHT));
    }

    let (losses, weights): (Vec<Var>, Vec<f32>) = terms.into_iter().unzip();
    let loss = tape.apply(WeightedSum(weights), &losses.iter().collect::<Vec<_>>())?;
    let total = scalar(&loss)?;
    if !total.is_finite() {
        return Err(Error::NotFinite {
            what: format!("the autoencoder's loss is {total}"),
        });
    }
    let mut grads = tape.backward(&loss, 1.0)?;
    let missing = || Error::operand("sae", "a gradient of every parameter", "none");
    let grads = parameters
        .iter()
        .map(|p| grads.take(p).ok_or_else(missing))
        .collect::<Result<_>>()?;
    Ok(Pass {
        x_hat: main.x_hat.into_value(),
        acts: main.acts,
        indices: main.indices,
        grads,
        fvu,
        auxk,
        multi_topk_fvu,
    })
}

/// What the k_aux strongest dead latents of each token make of the residual; without b_dec,
/// which is no part of the residual any more.
fn reconstruct_dead(
    tape: &mut Tape,
    x: &Var,
    parameters: &[Var; 4],
    k_aux: usize,
    dead: Tensor,
) -> Result<Var> {
    let encoder = TopK {
        k: k_aux.min(dead.len()),
        among: Some(dead),
        groups: SharedGroups::default(),
        frozen: None,
    };
    let d = parameters[3].value().len();
    let no_bias = Var::constant(Tensor::from_vec(vec![0.0; d], [d])?);
    Ok(reconstruct(tape, x, parameters, encoder, &no_bias)?.x_hat)
}

fn scalar(value: &Var) -> Result<f64> {
    let values = value.value().f32s()?;
    Ok(values.first().copied().map_or(f64::NAN, f64::from))
}

/// Σ_i w_i loss_i of scalars, which are in host memory on every device.
struct WeightedSum(Vec<f32>);

impl Operator for WeightedSum {
    type Saved = ();
    const NAME: &'static str = "weighted_sum";
    const CUDA: bool = true;

    fn forward(
        &self,
        _: &Device,
        inputs: &[&Tensor],
        _: &[bool],
    ) -> Result<(Vec<Tensor>, Self::Saved)> {
        let mut sum = 0.0;
        for (input, weight) in inputs.iter().zip(&self.0) {
            sum += weight * input.f32s()?.iter().sum::<f32>();
        }
        Ok((vec![Tensor::from_vec(vec![sum], [1])?], ()))
    }

    fn backward(
        &self,
        _: &Device,
        (): Self::Saved,
        grads: Vec<Option<Tensor>>,
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let upstream = crate::ops::only_grad(Self::NAME, grads)?.f32s()?[0];
        let scaled = self
            .0
            .iter()
            .map(|w| Tensor::from_vec(vec![w * upstream], [1]));
        scaled.map(|grad| grad.map(Some)).collect()
    }
}
