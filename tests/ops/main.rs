//! Every operator against float64, on every device: one file per stem.

mod harness;

mod embedding;
mod flash_attention;
mod rmsnorm;
mod rope;
mod swiglu;
