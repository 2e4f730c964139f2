//! Evaluation: perplexity, greedy generation, answer grading.
