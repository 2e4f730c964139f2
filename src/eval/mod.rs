//! Evaluation: perplexity, greedy generation, answer grading.

pub mod answer;
