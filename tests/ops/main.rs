//! Every operator against float64, on every device: one file per stem.

mod adamw;
mod clip;
mod cross_entropy;
mod cuda_device;
mod decode;
mod embedding;
mod flash_attention;
mod fvu;
mod gemm;
mod harness;
mod hopper;
mod kl_div;
mod lora;
mod rmsnorm;
mod rope;
mod sample;
mod signum;
mod sparse_decode;
mod swiglu;
mod topk;
mod traffic;
