//! Optimizers: AdamW, Adam, signum with schedule-free averaging, gradient clipping.
