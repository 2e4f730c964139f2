//! The two stages, run folders and checkpoints.

pub mod sae_trainer;
