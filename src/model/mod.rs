//! The models: Qwen2 with its adapters, and the sparse autoencoder. Nothing here knows a file.

mod cache;
mod config;
mod forward;
mod lora;
mod qwen2;
mod sae;

pub use config::Qwen2Config;
pub use forward::{Adapters, Layout, StepDropout};
pub use lora::{Lora, LoraConfig, LoraPair, Module};
pub use qwen2::{DecoderLayer, Linear, Qwen2};
pub(crate) use sae::reconstruct;
pub use sae::{Sae, SaeConfig};
