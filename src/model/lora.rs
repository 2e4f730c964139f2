//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): Y = X Wᵀ + s (X Aᵀ) Bᵀ.

use std::collections::BTreeMap;

use crate::tensor::Tensor;

/// The linear modules of a decoder layer that an adapter can sit on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Module {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Module {
    /// All seven, in the order of a forward pass.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The name in PEFT's `target_modules`: `q_proj`, …
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The path below a decoder layer: `self_attn.q_proj`, …
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The module of that name (`q_proj`, …).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|m| m.name() == name)
    }
}

/// How adapters are made.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraConfig {
    /// Rank r.
    pub r: usize,
    /// Numerator of the scale.
    pub alpha: f64,
    /// Probability that an input of an adapter is dropped in training.
    pub dropout: f32,
    /// Scale alpha / √r instead of alpha / r (rank-stabilised LoRA, arXiv 2312.03732).
    pub use_rslora: bool,
    /// The modules with an adapter.
    pub targets: Vec<Module>,
}

impl LoraConfig {
    /// The factor s of the low-rank product.
    pub fn scale(&self) -> f32 {
        let r = self.r as f64;
        (self.alpha / if self.use_rslora { r.sqrt() } else { r }) as f32
    }
}

/// The two factors of one adapter, f32.
#[derive(Clone, Debug)]
pub struct LoraPair {
    /// \[r, in features\]
    pub a: Tensor,
    /// \[out features, r\]
    pub b: Tensor,
}

/// A model's adapters by layer and module. Layers without an entry have none.
#[derive(Clone, Debug)]
pub struct Lora {
    pub config: LoraConfig,
    /// What the adapter was trained on (a folder or hub id), for the files that name it.
    pub base_model: String,
    pub pairs: BTreeMap<(usize, Module), LoraPair>,
}
