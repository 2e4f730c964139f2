use rayon::prelude::*;

use super::multi_tensor::Table;
use super::update::{Update, check, remove_parallel};
use crate::device::Device;
use crate::device::cuda::{Arg, Kernel};
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Settings of [`AdamW`]; the defaults are PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment, a step.
    pub beta1: f64,
    /// Decay of the second moment, a step.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of a parameter that a step at learning rate 1 takes away.
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

/// Adam (Kingma and Ba 2014, arXiv 1412.6980) with decoupled weight decay (Loshchilov and Hutter
/// 2017, arXiv 1711.05101), operation for operation as `torch.optim.AdamW`. With `weight_decay`
/// 0 it is Adam.
#[derive(Clone, Debug)]
pub struct AdamW {
    config: AdamWConfig,
    steps: u64,
    /// First moment of each parameter, shaped as it is.
    first: Vec<Tensor>,
    /// Second moment of each parameter.
    second: Vec<Tensor>,
    /// Where all of it lies on a GPU.
    table: Table,
}

const KERNEL: Kernel = Kernel {
    stem: "adamw",
    function: "adamw_f32",
};

impl AdamW {
    /// Zero moments for these parameters.
    pub fn new<'a>(
        config: AdamWConfig,
        parameters: impl IntoIterator<Item = &'a Tensor>,
    ) -> Result<Self> {
        let zeros = |p: &Tensor| Tensor::from_vec(vec![0.0; p.len()], p.shape());
        let first: Vec<_> = parameters.into_iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self {
            config,
            steps: 0,
            second: first.clone(),
            first,
            table: Table::default(),
        })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// First and second moment of every parameter, in the order of `new`.
    pub fn moments(&self) -> (&[Tensor], &[Tensor]) {
        (&self.first, &self.second)
    }

    /// Goes on from saved moments.
    ///
    /// # Errors
    /// Where they are not shaped as the parameters; nothing has changed then.
    pub fn restore(&mut self, steps: u64, first: Vec<Tensor>, second: Vec<Tensor>) -> Result<()> {
        for saved in [&first, &second] {
            if !saved
                .iter()
                .map(Tensor::shape)
                .eq(self.first.iter().map(Tensor::shape))
            {
                return Err(Error::operand(
                    "adamw",
                    "moments shaped as the parameters",
                    "others",
                ));
            }
        }
        (self.steps, self.first, self.second) = (steps, first, second);
        Ok(())
    }

    /// One step at learning rate `lr` for all parameters, in the order of `new`. On a GPU the
    /// values and moments stay in its memory afterwards.
    ///
    /// # Errors
    /// Where number or shapes are not those of `new`; nothing has changed then.
    pub fn step(&mut self, device: &Device, lr: f64, mut updates: Vec<Update>) -> Result<()> {
        check("adamw", &updates, Some(&self.first))?;
        self.steps += 1;
        let rule = Rule::new(&self.config, lr, self.steps);
        if let Device::Cuda(cuda) = device {
            let states: [&mut [Tensor]; 2] = [&mut self.first, &mut self.second];
            let args = rule.args();
            return self.table.step(cuda, KERNEL, &mut updates, states, &args);
        }
        let moments = self.first.iter_mut().zip(&mut self.second);
        // Of all parameters at once: many are too small to keep more than one thread busy.
        let mut tasks = Vec::new();
        for (update, (first, second)) in updates.iter_mut().zip(moments) {
            let (chunk, row) = update.chunking();
            let value = update.value.f32s_mut()?.chunks_mut(chunk);
            let grad = update.grad.f32s_mut()?.chunks_mut(chunk);
            let first = first.f32s_mut()?.chunks_mut(chunk);
            let second = second.f32s_mut()?.chunks_mut(chunk);
            let row = update.unit_rows.then_some(row);
            let parts = value.zip(grad).zip(first.zip(second));
            tasks.extend(parts.map(|parts| (row, parts)));
        }
        tasks
            .into_par_iter()
            .for_each(|(row, ((value, grad), (first, second)))| {
                vectorized!({
                    if let Some(row) = row {
                        remove_parallel(grad, value, row);
                    }
                    rule.apply(value, grad, first, second);
                });
            });
        Ok(())
    }
}

/// The factors of one step.
struct Rule {
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step_size: f32,
    root_correction: f32,
    eps: f32,
}

impl Rule {
    fn new(c: &AdamWConfig, lr: f64, step: u64) -> Self {
        Self {
            decay: (1.0 - lr * c.weight_decay) as f32,
            one_minus_beta1: (1.0 - c.beta1) as f32,
            beta2: c.beta2 as f32,
            one_minus_beta2: (1.0 - c.beta2) as f32,
            step_size: (lr / (1.0 - c.beta1.powf(step as f64))) as f32,
            root_correction: (1.0 - c.beta2.powf(step as f64)).sqrt() as f32,
            eps: c.eps as f32,
        }
    }

    /// As the kernel takes them.
    fn args(&self) -> [Arg; 7] {
        [
            self.decay,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.step_size,
            self.root_correction,
            self.eps,
        ]
        .map(Arg::F32)
    }

    #[inline(always)]
    fn apply(&self, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            *m += self.one_minus_beta1 * (g - *m);
            *v = self.beta2 * *v + self.one_minus_beta2 * g * g;
            let denominator = v.sqrt() / self.root_correction + self.eps;
            *p = *p * self.decay - self.step_size * (*m / denominator);
        }
    }
}
