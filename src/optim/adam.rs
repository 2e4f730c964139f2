//! Adam (Kingma and Ba 2014, arXiv 1412.6980), without weight decay.

use rayon::prelude::*;

use super::update::{Update, check, remove_parallel};
use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::tensor::Tensor;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPSILON: f32 = 1e-8;

/// The optimizer's state: both moments of every parameter.
#[derive(Clone, Debug, Default)]
pub struct Adam {
    steps: u64,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
}

impl Adam {
    /// Goes on from a saved state: both moments of every parameter, in the order of the updates.
    pub fn restored(steps: u64, first: Vec<Tensor>, second: Vec<Tensor>) -> Self {
        Self {
            steps,
            first,
            second,
        }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// First and second moment of every parameter; empty before the first step.
    pub fn moments(&self) -> (&[Tensor], &[Tensor]) {
        (&self.first, &self.second)
    }

    /// One step with learning rate `lr` for all parameters, always the same in the same order.
    pub fn step(&mut self, device: &Device, lr: f64, mut updates: Vec<Update>) -> Result<()> {
        check("adam", &updates, &self.first)?;
        check("adam", &updates, &self.second)?;
        if self.first.is_empty() {
            let zeros = |u: &Update| {
                Tensor::from_buffer(device.zeroed(u.value.len()), u.value.shape().to_vec())
            };
            self.first = updates.iter().map(zeros).collect::<Result<_>>()?;
            self.second = updates.iter().map(zeros).collect::<Result<_>>()?;
        }
        self.steps += 1;
        let n = self.steps as f64;
        let rate = (lr / (1.0 - BETA1.powf(n))) as f32;
        let correction = (1.0 / (1.0 - BETA2.powf(n)).sqrt()) as f32;
        let moments = self.first.iter_mut().zip(&mut self.second);
        for (update, (first, second)) in updates.iter_mut().zip(moments) {
            let (chunk, row) = update.chunking();
            let value = update.value.f32s_mut()?.par_chunks_mut(chunk);
            let grad = update.grad.f32s_mut()?.par_chunks_mut(chunk);
            let first = first.f32s_mut()?.par_chunks_mut(chunk);
            let second = second.f32s_mut()?.par_chunks_mut(chunk);
            let project = update.unit_rows;
            match device {
                Device::Cpu(_) => value.zip(grad).zip(first.zip(second)).for_each(
                    |((value, grad), (first, second))| {
                        vectorized!({
                            if project {
                                remove_parallel(grad, value, row);
                            }
                            apply(value, grad, first, second, (rate, correction));
                        });
                    },
                ),
            }
        }
        Ok(())
    }
}

#[inline(always)]
fn apply(
    value: &mut [f32],
    grad: &[f32],
    first: &mut [f32],
    second: &mut [f32],
    (rate, correction): (f32, f32),
) {
    let (keep1, keep2) = (BETA1 as f32, BETA2 as f32);
    let (add1, add2) = ((1.0 - BETA1) as f32, (1.0 - BETA2) as f32);
    let moments = first.iter_mut().zip(second);
    for ((v, &g), (m1, m2)) in value.iter_mut().zip(grad).zip(moments) {
        *m1 = keep1 * *m1 + add1 * g;
        *m2 = keep2 * *m2 + add2 * (g * g);
        *v -= rate * *m1 / (m2.sqrt() * correction + EPSILON);
    }
}
