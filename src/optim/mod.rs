//! Optimizers: AdamW, signum with schedule-free averaging, gradient clipping.

mod adamw;
mod clip;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::clip_grad_norm;
