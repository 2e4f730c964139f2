//! Evaluation: perplexity, greedy generation, answer grading.

pub mod answer;
pub mod generate;
mod inference;
pub mod pass;
pub mod perplexity;

pub use inference::Inference;
