//! Against numbers made with PyTorch in float64.

mod formats;
mod generate;
mod golden;
mod merge;
mod model;
mod sae;
mod stage_two;
