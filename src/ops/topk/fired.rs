//! Which latents are dead: those that have not been active for many tokens.

use super::{TopK, cuda};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::{Operator, expect_shape};
use crate::tensor::{DType, Tensor};

/// For each latent, the number of tokens since it was last active.
#[derive(Debug)]
pub struct Fired {
    /// \[m\] u32, on the device that last counted.
    counts: Tensor,
}

impl Fired {
    /// Every latent as if active just now.
    pub fn new(latents: usize) -> Result<Self> {
        let counts = Tensor::from_u32(vec![0; latents], [latents])?;
        Ok(Self { counts })
    }

    /// Goes on from saved counts.
    ///
    /// # Errors
    /// Counts of another number of latents or of another type; nothing has changed then.
    pub fn restore(&mut self, counts: Tensor) -> Result<()> {
        let latents = self.latents();
        if counts.len() != latents || counts.dtype() != DType::U32 {
            let expected = format!("{latents} counts in uint32");
            let got = format!("{} in {}", counts.len(), counts.dtype().name());
            return Err(Error::operand(TopK::NAME, expected, got));
        }
        self.counts = counts;
        Ok(())
    }

    /// Number of latents.
    pub fn latents(&self) -> usize {
        self.counts.len()
    }

    /// The counts \[m\] u32 in host memory.
    pub fn counts(&self) -> Result<Tensor> {
        self.counts.to_u32()
    }

    /// Takes note of one selection: acts \[T, k\] f32 and indices \[T, k\] u32, as
    /// [`TopK`] gives them. A latent is active where its activation is above zero.
    pub fn record(&mut self, device: &Device, acts: &Tensor, indices: &Tensor) -> Result<()> {
        expect_shape(TopK::NAME, indices, acts.shape())?;
        if let Device::Cuda(cuda) = device {
            self.counts = cuda.resident(&self.counts, DType::U32)?;
            let acts = cuda.resident(acts, DType::F32)?;
            let indices = cuda.resident(indices, DType::U32)?;
            return cuda::count_fired(cuda, &self.counts, &acts, &indices);
        }
        let tokens = u32::try_from(acts.matrix_dims().0).unwrap_or(u32::MAX);
        let counts = self.counts.to_u32()?;
        let older = counts.u32s()?.iter().map(|n| n.saturating_add(tokens));
        let mut counts: Vec<u32> = older.collect();
        for (&act, &latent) in acts.f32s()?.iter().zip(indices.u32s()?) {
            if let Some(count) = counts.get_mut(latent as usize).filter(|_| act > 0.0) {
                *count = 0;
            }
        }
        self.counts = Tensor::from_u32(counts, [self.latents()])?;
        Ok(())
    }

    /// The latents that have not been active for more than `tokens` tokens: \[n\] u32, ascending.
    pub fn dead(&self, device: &Device, tokens: u32) -> Result<Tensor> {
        if let Device::Cuda(cuda) = device {
            let counts = cuda.resident(&self.counts, DType::U32)?;
            return cuda::dead(cuda, &counts, tokens);
        }
        let counts = self.counts.to_u32()?;
        let counts = (0u32..).zip(counts.u32s()?);
        let dead = counts.filter(|&(_, &n)| n > tokens);
        let dead: Vec<u32> = dead.map(|(latent, _)| latent).collect();
        let len = dead.len();
        Tensor::from_u32(dead, [len])
    }
}
