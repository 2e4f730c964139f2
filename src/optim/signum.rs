//! Sign descent (Bernstein et al. 2018, arXiv 1802.04434) under schedule-free averaging
//! (Defazio et al. 2024, arXiv 2405.15682).

use rayon::prelude::*;

use super::multi_tensor::Table;
use super::update::{Update, check, remove_parallel};
use crate::device::Device;
use crate::device::cuda::{Arg, Kernel};
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::tensor::Tensor;

/// The optimizer's state. A parameter's own value is y, where gradients are taken; z is kept
/// here; the average x = (y − (1−β) z)/β is what should be saved and is never stored. Step n:
/// z ← z − lr sign(g), x ← x + (z − x)/(n+1), y ← β x + (1−β) z, with sign(0) = 0 and z = y
/// before the first step.
#[derive(Clone, Debug)]
pub struct Signum {
    lr: f32,
    beta: f32,
    steps: u64,
    z: Vec<Tensor>,
    /// Where all of it lies on a GPU.
    table: Table,
}

const KERNEL: Kernel = Kernel {
    stem: "signum",
    function: "signum_f32",
};

impl Signum {
    /// β as the Resa recipe has it.
    pub const BETA: f32 = 0.95;

    /// No step taken yet.
    pub fn new(lr: f32) -> Self {
        Self::restored(lr, 0, Vec::new())
    }

    /// Goes on from a saved state: z of every parameter, in the order of the updates.
    pub fn restored(lr: f32, steps: u64, z: Vec<Tensor>) -> Self {
        Self {
            lr,
            beta: Self::BETA,
            steps,
            z,
            table: Table::default(),
        }
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The learning rate.
    pub fn lr(&self) -> f32 {
        self.lr
    }

    /// z of every parameter; empty before the first step.
    pub fn z(&self) -> &[Tensor] {
        &self.z
    }

    /// One step for all parameters, always the same ones in the same order.
    ///
    /// One sweep: y, z and the gradient are read once, y and z written once, also where the
    /// gradient's component along the rows is taken out. On a GPU y and z stay in its memory
    /// afterwards.
    pub fn step(&mut self, device: &Device, mut updates: Vec<Update>) -> Result<()> {
        let started = !self.z.is_empty();
        check("signum", &updates, started.then_some(&self.z[..]))?;
        if !started {
            self.z = updates.iter().map(|u| u.value.clone()).collect();
        }
        let rule = Rule {
            lr: self.lr,
            to_x: 1.0 - 1.0 / self.beta,
            share: (1.0 / (self.steps + 1) as f64) as f32,
            to_y: 1.0 - self.beta,
        };
        match device {
            Device::Cuda(cuda) => {
                let (states, args) = ([&mut self.z[..]], rule.args());
                self.table.step(cuda, KERNEL, &mut updates, states, &args)?;
            }
            Device::Cpu(_) => rule.apply_all(&mut updates, &mut self.z)?,
        }
        self.steps += 1;
        Ok(())
    }

    /// The average x of parameter `index`, whose value is `y`, in host memory; y itself before
    /// the first step.
    pub fn averaged(&self, index: usize, y: &Tensor) -> Result<Tensor> {
        let Some(z) = self.z.get(index) else {
            return Ok(y.clone());
        };
        let to_x = 1.0 - 1.0 / self.beta;
        let (host_y, host_z) = (y.to_f32()?, z.to_f32()?);
        let pairs = host_y.f32s()?.iter().zip(host_z.f32s()?);
        Tensor::from_vec(
            pairs.map(|(&y, &z)| y + to_x * (z - y)).collect(),
            y.shape(),
        )
    }
}

/// The factors of one step. x = y + (1 − 1/β)(z − y) and y = x + (1−β)(z − x) are the
/// definitions written so that rounding vanishes with the distance of the two.
struct Rule {
    lr: f32,
    to_x: f32,
    share: f32,
    to_y: f32,
}

impl Rule {
    fn apply_all(&self, updates: &mut [Update], z: &mut [Tensor]) -> Result<()> {
        for (update, z) in updates.iter_mut().zip(z) {
            let (chunk, row) = update.chunking();
            let y = update.value.f32s_mut()?.par_chunks_mut(chunk);
            let z = z.f32s_mut()?.par_chunks_mut(chunk);
            let g = update.grad.f32s_mut()?.par_chunks_mut(chunk);
            let project = update.unit_rows;
            y.zip(z).zip(g).for_each(|((y, z), g)| {
                vectorized!({
                    if project {
                        remove_parallel(g, y, row);
                    }
                    self.apply(y, z, g);
                });
            });
        }
        Ok(())
    }

    /// As the kernel takes them.
    fn args(&self) -> [Arg; 4] {
        [self.lr, self.to_x, 1.0 - self.share, self.to_y].map(Arg::F32)
    }

    #[inline(always)]
    fn apply(&self, y: &mut [f32], z: &mut [f32], g: &[f32]) {
        for ((y, z), g) in y.iter_mut().zip(z).zip(g) {
            let x = *y + self.to_x * (*z - *y);
            let sign = f32::from(u8::from(*g > 0.0)) - f32::from(u8::from(*g < 0.0));
            *z -= self.lr * sign;
            // From z's side: exact in the first step, where the average is z.
            let x = *z - (1.0 - self.share) * (*z - x);
            *y = x + self.to_y * (*z - x);
        }
    }
}
