//! The two stages, run folders and checkpoints.
