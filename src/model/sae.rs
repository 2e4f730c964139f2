//! TopK sparse autoencoders (Gao et al. 2024, arXiv 2406.04093).

use crate::tensor::Tensor;

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

/// A TopK sparse autoencoder: A = topk(relu((X − b_dec) W_encᵀ + b_enc)), X̂ = A W_dec + b_dec.
/// All tensors f32.
#[derive(Clone, Debug)]
pub struct Sae {
    pub config: SaeConfig,
    /// \[m, d\]
    pub w_enc: Tensor,
    /// \[m\]
    pub b_enc: Tensor,
    /// \[m, d\]
    pub w_dec: Tensor,
    /// \[d\]
    pub b_dec: Tensor,
}
