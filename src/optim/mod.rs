//! Optimizers: AdamW, signum with schedule-free averaging, gradient clipping. On a GPU parameters,
//! gradients and moments are f32 in its memory, and one launch updates all of them.

mod adamw;
mod clip;
mod multi_tensor;
pub mod signum;
mod update;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::clip_grad_norm;
pub use update::{Update, remove_parallel};
