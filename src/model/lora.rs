//! Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): Y = X Wᵀ + s (X Aᵀ) Bᵀ.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::device::CudaDevice;
use crate::error::Result;
use crate::model::{Qwen2Config, reserved};
use crate::rng::{Purpose, Stream};
use crate::tensor::{DType, Tensor};

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
    /// Rank, scale and dropout of all pairs.
    pub config: LoraConfig,
    /// What the adapter was trained on (a folder, or a hub id with its revision if any), for the
    /// files that name it.
    pub base_model: String,
    /// A (and B) by layer and module.
    pub pairs: BTreeMap<(usize, Module), LoraPair>,
}

impl Lora {
    /// New adapters on the target modules of `layers`: A uniform in ±1/√in (Kaiming with
    /// a = √5, as PEFT draws it), B zero, so that they change nothing yet.
    pub fn new(
        config: LoraConfig,
        model: &Qwen2Config,
        layers: Range<usize>,
        seed: u64,
    ) -> Result<Self> {
        let mut pairs = BTreeMap::new();
        for layer in layers {
            for &module in &config.targets {
                let (rows, cols) = model.module_dims(module);
                let index = layer as u32 * Module::ALL.len() as u32 + module as u32;
                let stream = Stream::new(seed, Purpose::Init, 1, index);
                let bound = 1.0 / (cols as f32).sqrt();
                let mut a = reserved(config.r.saturating_mul(cols), "--lora-r")?;
                let mut b = reserved(config.r.saturating_mul(rows), "--lora-r")?;
                let uniform = |i| (stream.uniform(i as u64) * 2.0 - 1.0) * bound;
                a.extend((0..config.r * cols).map(uniform));
                b.resize(config.r * rows, 0.0);
                let a = Tensor::from_vec(a, [config.r, cols])?;
                let b = Tensor::from_vec(b, [rows, config.r])?;
                pairs.insert((layer, module), LoraPair { a, b });
            }
        }
        Ok(Self {
            config,
            base_model: String::new(),
            pairs,
        })
    }

    /// The adapters with `weight` times their effect.
    pub fn weighted(mut self, weight: f64) -> Self {
        self.config.alpha *= weight;
        self
    }

    /// Brings the adapters to a GPU in bf16, for use without training.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn upload(&mut self, cuda: &CudaDevice) -> Result<()> {
        for pair in self.pairs.values_mut() {
            for factor in [&mut pair.a, &mut pair.b] {
                *factor = cuda.resident(factor, DType::Bf16)?;
            }
        }
        Ok(())
    }

    /// The same adapters in the host's memory.
    pub fn to_host(&self) -> Result<Self> {
        let mut host = self.clone();
        for pair in host.pairs.values_mut() {
            (pair.a, pair.b) = (pair.a.to_f32()?, pair.b.to_f32()?);
        }
        Ok(host)
    }
}
