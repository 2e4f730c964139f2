//! resa-engine turns a language model into a reasoning model with SAE-Tuning (Resa, arXiv
//! 2506.09967): a TopK sparse autoencoder is trained on the activations of a source model, put
//! into a target model, and LoRA adapters learn to undo what it costs.

pub mod analysis;
pub mod bench;
pub mod data;
pub mod device;
pub mod doctor;
pub mod error;
pub mod eval;
pub mod formats;
pub mod model;
pub mod ops;
pub mod optim;
pub mod report;
pub mod rng;
pub mod tape;
pub mod tensor;
pub mod train;

pub use device::Device;
pub use error::{Error, Result};
pub use tensor::Tensor;
