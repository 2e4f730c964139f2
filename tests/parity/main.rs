//! Against numbers made with PyTorch in float64.

mod formats;
mod sae;
