//! What a model does after training: generation, grading, Pass@1 and pass@k, perplexity.

pub mod answer;
pub mod generate;
mod inference;
pub mod pass;
pub mod perplexity;
pub mod results;
mod sampling;
mod text_stream;

pub use generate::{Completion, FinishReason, GenerateOptions, Generator, Request};
pub use inference::Inference;
pub use sampling::{Place, Sampling};
pub use text_stream::TextStream;
