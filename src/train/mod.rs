//! The two stages, run folders and checkpoints.

pub mod checkpoint;
pub mod config;
pub mod metrics;
pub mod observer;
pub mod plan;
pub mod run_dir;
pub mod settings;
mod validate;

pub use config::TrainConfig;
pub use metrics::{MetricsLog, StepMetrics, StepStage};
pub use observer::{CancelFlag, Event, Observer, RunOptions};
pub use run_dir::RunDir;
pub use settings::{DeviceSetting, DtypeSetting, Method, SaeGrad, SaeInit, SaeOptimizer, Stage};
pub mod sae_trainer;
