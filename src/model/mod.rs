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

use crate::error::{Error, Result};

/// Room for `len` weights; the error names the option that says how many there are.
pub(crate) fn reserved(len: usize, option: &str) -> Result<Vec<f32>> {
    let mut room = Vec::new();
    room.try_reserve_exact(len).map_err(|_| {
        let bytes = len.saturating_mul(size_of::<f32>());
        let what =
            format!("expected weights that memory has room for, found {bytes} bytes of them");
        Error::setting(option, what)
    })?;
    Ok(room)
}
