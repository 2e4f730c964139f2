//! Every operator against float64, on every device: one file per stem.

mod gemm;
mod harness;
mod lora;
