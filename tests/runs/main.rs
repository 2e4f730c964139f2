//! The house around training: settings, run folders, checkpoints, metrics, event files, the
//! plan and the command line.

mod checkpoint;
mod cli;
mod config;
mod events;
mod metrics;
mod plan;
mod progress;
mod run_dir;

use std::path::Path;

use resa_engine::train::{RunDir, TrainConfig};

/// A new run in folder `name` of `parent`.
fn new_run(parent: &Path, name: &str) -> RunDir {
    RunDir::create(parent.join(name), &TrainConfig::default()).unwrap()
}
