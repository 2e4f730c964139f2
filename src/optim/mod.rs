//! Optimizers: AdamW, signum with schedule-free averaging, gradient clipping.

mod adamw;
mod clip;

pub use adamw::{AdamW, AdamWConfig};
pub use clip::clip_grad_norm;
//! Optimizers: AdamW, Adam, signum with schedule-free averaging, gradient clipping.

pub mod adam;
pub mod signum;
mod update;

pub use update::Update;
