//! What a run shows: progress bars and TensorBoard events.

pub mod progress;
pub mod tensorboard;

pub use progress::Progress;
pub use tensorboard::{EventWriter, TensorBoard};
