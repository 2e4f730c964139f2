//! The two stages, run folders and checkpoints.

pub mod checkpoint;
pub mod config;
mod dry_run;
pub mod example;
pub mod fetch;
pub mod flop;
mod frozen;
pub mod inputs;
pub mod memory;
pub mod metrics;
pub mod observer;
pub mod plan;
pub mod row_cache;
mod run;
pub mod run_dir;
pub mod sae_trainer;
mod schedule;
mod session;
pub mod settings;
pub mod sft_trainer;
mod stage_one;
mod stage_two;
#[cfg(test)]
mod testing;
mod validate;

pub use config::TrainConfig;
pub use dry_run::dry_run;
pub use metrics::{MetricsLog, StepMetrics, StepStage};
pub use observer::{CancelFlag, Event, Observer, RunOptions};
pub use run::{PassAt1, Summary, run};
pub use run_dir::RunDir;
pub use schedule::Schedule;
pub use settings::{DeviceSetting, DtypeSetting, Method, SaeGrad, SaeInit, SaeOptimizer, Stage};
