//! Every operator against float64, on every device: one file per stem.

mod fvu;
mod harness;
mod signum;
mod sparse_decode;
mod topk;
