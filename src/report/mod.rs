//! What a run shows: progress bars, TensorBoard events, a page to look at.

pub mod html;
pub mod progress;
pub mod tensorboard;

pub use html::html;
pub use progress::Progress;
pub use tensorboard::{EventWriter, TensorBoard};
