//! Optimizers: AdamW, signum with schedule-free averaging, gradient clipping.

mod adamw;
mod clip;
pub mod signum;
mod update;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::clip_grad_norm;
pub use update::{Update, remove_parallel};
