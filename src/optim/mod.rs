//! Optimizers: AdamW, Adam, signum with schedule-free averaging, gradient clipping.

pub mod adam;
pub mod signum;
mod update;

pub use update::{Update, remove_parallel};
