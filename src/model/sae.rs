//! TopK sparse autoencoders (Gao et al. 2024, arXiv 2406.04093).

use rayon::prelude::*;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::{Error, Result};
use crate::model::reserved;
use crate::ops::Operator;
use crate::ops::math::dot;
use crate::ops::sparse_decode::cuda::normalize_rows;
use crate::ops::sparse_decode::{SharedGroups, SparseDecode};
use crate::ops::topk::{Frozen, TopK};
use crate::rng::{Purpose, Stream};
use crate::tape::{Tape, Var};
use crate::tensor::{DType, Tensor};

/// The shape of a sparse autoencoder; the keys of sparsify's `cfg.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct SaeConfig {
    /// Size d of what is reconstructed.
    pub d_in: usize,
    /// Number m of latents.
    pub num_latents: usize,
    /// Latents active for a token.
    pub k: usize,
    /// Latents per input dimension, as far as it is a setting (`num_latents` is what counts).
    pub expansion_factor: usize,
    /// Whether decoder rows are kept at unit norm in training.
    pub normalize_decoder: bool,
    /// Whether Multi-TopK was part of the loss.
    pub multi_topk: bool,
}

impl SaeConfig {
    /// An autoencoder of `num_latents` latents, `k` of them active, for activations of size
    /// `d_in`, with unit decoder rows.
    pub fn new(d_in: usize, num_latents: usize, k: usize) -> Self {
        Self {
            d_in,
            num_latents,
            k,
            expansion_factor: num_latents / d_in.max(1),
            normalize_decoder: true,
            multi_topk: false,
        }
    }
}

/// A TopK sparse autoencoder: A = topk(relu((X − b_dec) W_encᵀ + b_enc)), X̂ = A W_dec + b_dec.
/// All tensors f32.
#[derive(Clone, Debug)]
pub struct Sae {
    /// Sizes and the variant.
    pub config: SaeConfig,
    /// \[m, d\]
    pub w_enc: Tensor,
    /// \[m\]
    pub b_enc: Tensor,
    /// \[m, d\]
    pub w_dec: Tensor,
    /// \[d\]
    pub b_dec: Tensor,
    /// What a GPU has made of the encoder; made anew after [`Self::tensors_mut`].
    frozen: Frozen,
}

impl Sae {
    /// An autoencoder of `tensors` W_enc, b_enc, W_dec and b_dec, of the shapes of `config` (see
    /// [`Self::check`]).
    pub fn new(config: SaeConfig, [w_enc, b_enc, w_dec, b_dec]: [Tensor; 4]) -> Self {
        Self {
            config,
            w_enc,
            b_enc,
            w_dec,
            b_dec,
            frozen: Frozen::default(),
        }
    }

    /// The four tensors' names in sparsify's files, in the order of [`Self::tensors`].
    pub const TENSORS: [&'static str; 4] = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"];

    /// Fresh weights: W_enc uniform in (−1/√d, 1/√d) as PyTorch's linear layer has it, W_dec the
    /// same with unit rows, biases zero. `index` keeps the autoencoders of one seed apart.
    pub fn scratch(device: &Device, config: SaeConfig, seed: u64, index: u32) -> Result<Self> {
        let (m, d) = (config.num_latents, config.d_in);
        let Some(len) = m.checked_mul(d).filter(|&len| len > 0) else {
            let what = format!("an SAE of {m} latents over {d} dimensions cannot be made");
            return Err(Error::setting("--latents", what));
        };
        if config.k == 0 || config.k > m {
            let what = format!("{} is not between 1 and the {m} latents", config.k);
            return Err(Error::setting("--k", what));
        }
        let stream = Stream::new(seed, Purpose::Init, 0, index);
        let bound = 1.0 / (d as f32).sqrt();
        let mut weights = reserved(len, "--latents")?;
        weights.resize(len, 0.0);
        device.run(|| {
            let words = weights.par_chunks_mut(4).enumerate();
            words.for_each(|(block, values)| {
                for (v, word) in values.iter_mut().zip(stream.block(block as u32)) {
                    let unit = (word >> 8) as f32 / (1 << 24) as f32;
                    *v = (2.0 * unit - 1.0) * bound;
                }
            });
        });
        let mut decoder = reserved(len, "--latents")?;
        decoder.extend_from_slice(&weights);
        let [w_enc, w_dec] = [weights, decoder].map(|w| Tensor::from_vec(w, [m, d]));
        let zeros = |n: usize| Tensor::from_vec(vec![0.0; n], [n]);
        let tensors = [w_enc?, zeros(m)?, w_dec?, zeros(d)?];
        let mut sae = Self::new(config, tensors);
        // In host memory, where all of it is until a device trains it.
        sae.normalize_decoder(&device.to_host())?;
        Ok(sae)
    }

    /// An error naming the tensor whose shape or dtype does not fit the configuration.
    pub fn check(&self) -> Result<()> {
        let (m, d) = (self.config.num_latents, self.config.d_in);
        let shapes: [&[usize]; 4] = [&[m, d], &[m], &[m, d], &[d]];
        for ((name, tensor), shape) in Self::TENSORS.iter().zip(self.tensors()).zip(shapes) {
            if tensor.shape() != shape || tensor.dtype() != DType::F32 {
                return Err(Error::operand(
                    "sae",
                    format!("{name}: float32 of shape {shape:?}"),
                    format!("{} of shape {:?}", tensor.dtype().name(), tensor.shape()),
                ));
            }
        }
        Ok(())
    }

    /// W_enc, b_enc, W_dec, b_dec.
    pub fn tensors(&self) -> [&Tensor; 4] {
        [&self.w_enc, &self.b_enc, &self.w_dec, &self.b_dec]
    }

    /// W_enc, b_enc, W_dec, b_dec, for writing.
    pub fn tensors_mut(&mut self) -> [&mut Tensor; 4] {
        self.frozen = Frozen::default();
        [
            &mut self.w_enc,
            &mut self.b_enc,
            &mut self.w_dec,
            &mut self.b_dec,
        ]
    }

    /// Brings the tensors to where `device` trains them, in f32; those that are there stay.
    ///
    /// # Errors
    /// Out of memory, or a GPU that cannot be read.
    pub fn move_to(&mut self, device: &Device) -> Result<()> {
        for tensor in self.tensors_mut() {
            *tensor = match device {
                Device::Cuda(cuda) => cuda.resident(tensor, DType::F32)?,
                Device::Cpu(_) => tensor.to_f32()?,
            };
        }
        Ok(())
    }

    /// Divides each row of W_dec by its norm + 2^-23. On a GPU W_dec stays in its memory.
    pub fn normalize_decoder(&mut self, device: &Device) -> Result<()> {
        if let Device::Cuda(cuda) = device {
            return normalize_rows(cuda, &mut self.w_dec);
        }
        let d = self.config.d_in.max(1);
        let rows = self.w_dec.f32s_mut()?.par_chunks_mut(d);
        device.run(|| {
            rows.for_each(|row| {
                vectorized!({
                    let divisor = dot(row, row).sqrt() + f32::EPSILON;
                    row.iter_mut().for_each(|v| *v /= divisor);
                });
            });
        });
        Ok(())
    }

    fn encoder(&self) -> TopK {
        TopK {
            frozen: Some(self.frozen.clone()),
            ..TopK::new(self.config.k, SharedGroups::default())
        }
    }

    /// The k active latents of each token of `x` \[T, d\], without gradient: acts \[T, k\] f32
    /// and indices \[T, k\] u32, ascending.
    pub fn encode(&self, device: &Device, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let encoder = self.encoder();
        let inputs = [x, &self.w_enc, &self.b_enc, &self.b_dec];
        let (outputs, _) = device.run(|| encoder.forward(device, &inputs, &[false; 4]))?;
        let [acts, indices] = pair(outputs)?;
        Ok((acts, indices))
    }

    /// X̂ \[T, d\] of `x` \[T, d\] on a tape: the gradient flows to `x` through the active
    /// latents; the SAE itself stays as it is.
    pub fn pass_through(&self, tape: &mut Tape, x: &Var) -> Result<Var> {
        let parameters = self.tensors().map(|t| Var::constant(t.clone()));
        let encoder = self.encoder();
        let passed = reconstruct(tape, x, &parameters, encoder, &parameters[3])?;
        Ok(passed.x_hat)
    }

    /// X̂ \[T, d\] of `x` \[T, d\], without gradient.
    pub fn reconstruct(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        let (acts, indices) = self.encode(device, x)?;
        self.decode(device, &acts, indices)
    }

    /// X̂ \[T, d\] of `acts` \[T, k\] f32 of the latents `indices` \[T, k\] u32, without
    /// gradient: the other half of [`Self::encode`].
    pub fn decode(&self, device: &Device, acts: &Tensor, indices: Tensor) -> Result<Tensor> {
        let groups = SharedGroups::default();
        let decoder = SparseDecode { indices, groups };
        let inputs = [acts, &self.w_dec, &self.b_dec];
        let (outputs, _) = device.run(|| decoder.forward(device, &inputs, &[false; 3]))?;
        let x_hat = outputs.into_iter().next();
        x_hat.ok_or_else(|| Error::operand(SparseDecode::NAME, "one output", "none"))
    }
}

/// What a pass through the autoencoder gives on a tape.
pub(crate) struct Reconstruction {
    /// \[T, d\]
    pub x_hat: Var,
    /// The active latents' values \[T, k\] f32.
    pub acts: Tensor,
    /// Their numbers \[T, k\] u32.
    pub indices: Tensor,
}

/// Encodes `x` \[T, d\] with W_enc, b_enc and b_dec, and decodes it with W_dec and `bias`
/// \[d\], which is b_dec where `x` itself is to be reconstructed.
pub(crate) fn reconstruct(
    tape: &mut Tape,
    x: &Var,
    [w_enc, b_enc, w_dec, b_dec]: &[Var; 4],
    encoder: TopK,
    bias: &Var,
) -> Result<Reconstruction> {
    let groups = encoder.groups.clone();
    let [acts, indices] = pair(tape.apply_all(encoder, &[x, w_enc, b_enc, b_dec])?)?;
    let indices = indices.into_value();
    let decoder = SparseDecode {
        indices: indices.clone(),
        groups,
    };
    let x_hat = tape.apply(decoder, &[&acts, w_dec, bias])?;
    Ok(Reconstruction {
        x_hat,
        acts: acts.into_value(),
        indices,
    })
}

fn pair<T>(outputs: Vec<T>) -> Result<[T; 2]> {
    let wrong = |_| Error::operand(TopK::NAME, "two outputs", "another number");
    outputs.try_into().map_err(wrong)
}
