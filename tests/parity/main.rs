//! Against numbers made with PyTorch in float64.

mod formats;
mod generate;
mod golden;
mod model;
mod sae;
mod stage_two;
