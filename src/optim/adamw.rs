use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Settings of [`AdamW`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// Adam with decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101), operation for
/// operation as `torch.optim.AdamW`. With `weight_decay` 0 it is Adam.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    step: u64,
    /// First and second moment of each parameter, shaped as it is.
    moments: Vec<(Tensor, Tensor)>,
}

impl AdamW {
    /// Zero moments for these parameters.
    pub fn new<'a>(
        config: AdamWConfig,
        parameters: impl IntoIterator<Item = &'a Tensor>,
    ) -> Result<Self> {
        let zeros = |p: &Tensor| Tensor::from_vec(vec![0.0; p.len()], p.shape());
        let moments = parameters.into_iter().map(|p| Ok((zeros(p)?, zeros(p)?)));
        Ok(Self {
            config,
            step: 0,
            moments: moments.collect::<Result<_>>()?,
        })
    }

    /// Number of steps taken.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// (first, second) moment of each parameter, in the order of `new`.
    pub fn moments(&self) -> &[(Tensor, Tensor)] {
        &self.moments
    }

    /// Goes on from saved moments.
    pub fn restore(&mut self, step: u64, moments: Vec<(Tensor, Tensor)>) -> Result<()> {
        let fits = moments.len() == self.moments.len()
            && moments
                .iter()
                .zip(&self.moments)
                .all(|(new, old)| new.0.shape() == old.0.shape() && new.1.shape() == old.1.shape());
        if !fits {
            return Err(Error::operand(
                "adamw",
                "moments shaped as the parameters",
                "others",
            ));
        }
        (self.step, self.moments) = (step, moments);
        Ok(())
    }

    /// One update of all parameters at learning rate `lr`.
    pub fn step(
        &mut self,
        lr: f64,
        parameters: &mut [&mut Tensor],
        grads: &[&Tensor],
    ) -> Result<()> {
        if parameters.len() != self.moments.len() || grads.len() != self.moments.len() {
            return Err(Error::operand(
                "adamw",
                format!("{} parameters and gradients", self.moments.len()),
                format!("{} and {}", parameters.len(), grads.len()),
            ));
        }
        self.step += 1;
        let c = &self.config;
        let update = Update {
            decay: (1.0 - lr * c.weight_decay) as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            step_size: (lr / (1.0 - c.beta1.powf(self.step as f64))) as f32,
            root_correction: (1.0 - c.beta2.powf(self.step as f64)).sqrt() as f32,
            eps: c.eps as f32,
        };
        for ((p, g), (m, v)) in parameters.iter_mut().zip(grads).zip(&mut self.moments) {
            update.apply(p.f32s_mut()?, g.f32s()?, m.f32s_mut()?, v.f32s_mut()?);
        }
        Ok(())
    }
}

struct Update {
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

impl Update {
    fn apply(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        const CHUNK: usize = 1 << 14;
        p.par_chunks_mut(CHUNK)
            .zip(g.par_chunks(CHUNK))
            .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
            .for_each(|((p, g), (m, v))| {
                for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                    *m += self.one_minus_beta1 * (g - *m);
                    *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
                    let denominator = v.sqrt() / self.root_correction + self.eps;
                    *p = *p * self.decay - self.step_size * (*m / denominator);
                }
            });
    }
}
