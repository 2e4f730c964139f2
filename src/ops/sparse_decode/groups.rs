use std::sync::{Arc, OnceLock};

use super::cuda::CudaGroups;
use crate::device::CudaDevice;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The (token, slot) pairs of a TopK selection, grouped by the latent they name: who reduces a
/// latent's gradient reads its pairs in one fixed order, so no atomics are needed and equal
/// inputs give equal bits on any number of threads.
#[derive(Debug)]
pub struct LatentGroups {
    offsets: Vec<usize>,
    pairs: Vec<u32>,
}

impl LatentGroups {
    /// Counting sort of `indices` (\[T, k\], flattened) over `latents` latents. An index out of
    /// range or more than 2^32 pairs is an error.
    pub fn new(indices: &[u32], latents: usize) -> Result<Self> {
        check_indices("latent groups", indices, latents)?;
        if u32::try_from(indices.len()).is_err() {
            let got = format!("{}", indices.len());
            return Err(Error::operand(
                "latent groups",
                "fewer than 2^32 pairs",
                got,
            ));
        }
        let mut offsets = vec![0usize; latents + 1];
        for &latent in indices {
            offsets[latent as usize + 1] += 1;
        }
        for i in 0..latents {
            offsets[i + 1] += offsets[i];
        }
        let mut next = offsets.clone();
        let mut pairs = vec![0; indices.len()];
        for (pair, &latent) in (0u32..).zip(indices) {
            let slot = &mut next[latent as usize];
            pairs[*slot] = pair;
            *slot += 1;
        }
        Ok(Self { offsets, pairs })
    }

    /// Number of latents.
    pub fn latents(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The pairs that name `latent`, ascending; pair p is slot p mod k of token p / k.
    pub fn pairs_of(&self, latent: usize) -> &[u32] {
        &self.pairs[self.offsets[latent]..self.offsets[latent + 1]]
    }

    /// All pairs, by latent.
    pub fn pairs(&self) -> &[u32] {
        &self.pairs
    }

    /// Cuts `values`, one for each of [`Self::pairs`], into the parts of `block` latents each.
    pub(crate) fn split_blocks<'a>(
        &self,
        block: usize,
        mut values: &'a mut [f32],
    ) -> Vec<&'a mut [f32]> {
        let mut parts = Vec::with_capacity(self.latents().div_ceil(block));
        for first in (0..self.latents()).step_by(block) {
            let last = (first + block).min(self.latents());
            let (part, rest) = values.split_at_mut(self.offsets[last] - self.offsets[first]);
            parts.push(part);
            values = rest;
        }
        parts
    }
}

/// The groups of one selection, made when first asked for. [`super::SparseDecode`] and
/// [`crate::ops::topk::TopK`] of one step hold clones of one value and so sort only once; a
/// forward pass without backward never sorts. Make a fresh one for each selection.
#[derive(Clone, Debug, Default)]
pub struct SharedGroups(Arc<Made>);

#[derive(Debug, Default)]
struct Made {
    on_host: OnceLock<LatentGroups>,
    on_device: OnceLock<CudaGroups>,
}

impl SharedGroups {
    /// The groups of `indices`. An error for an index out of range, and where the groups were
    /// made from a selection of another size.
    pub fn get(&self, indices: &[u32], latents: usize) -> Result<&LatentGroups> {
        let groups = match self.0.on_host.get() {
            Some(groups) => groups,
            None => {
                let made = LatentGroups::new(indices, latents)?;
                self.0.on_host.get_or_init(|| made)
            }
        };
        expect_size(
            (groups.pairs.len(), groups.latents()),
            (indices.len(), latents),
        )?;
        Ok(groups)
    }

    /// The same on a GPU, of indices that are there.
    pub(crate) fn on_device(
        &self,
        cuda: &CudaDevice,
        indices: &Tensor,
        latents: usize,
    ) -> Result<&CudaGroups> {
        let groups = match self.0.on_device.get() {
            Some(groups) => groups,
            None => {
                let made = CudaGroups::new(cuda, indices, latents)?;
                self.0.on_device.get_or_init(|| made)
            }
        };
        expect_size((groups.len(), groups.latents()), (indices.len(), latents))?;
        Ok(groups)
    }
}

/// An error unless groups have the pairs and the latents of the selection they are asked for.
fn expect_size(made: (usize, usize), asked: (usize, usize)) -> Result<()> {
    if made == asked {
        return Ok(());
    }
    let text = |(pairs, latents)| format!("a selection of {pairs} pairs over {latents} latents");
    Err(Error::operand("latent groups", text(made), text(asked)))
}

/// An error unless every index names one of `latents` latents.
pub(crate) fn check_indices(op: &'static str, indices: &[u32], latents: usize) -> Result<()> {
    match indices.iter().max() {
        Some(&max) if max as usize >= latents => Err(Error::operand(
            op,
            format!("latent indices below {latents}"),
            format!("{max}"),
        )),
        _ => Ok(()),
    }
}
