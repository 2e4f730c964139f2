//! A `libcuda` that runs PTX on the CPU, with sanitizers always on and counters.
//!
//! The shared library implements the part of the CUDA driver API that cudarc uses; a program
//! that loads it instead of NVIDIA's driver runs its kernels unchanged. See the README for what
//! is covered. In Rust tests, [`install`] picks the installed driver or the emulator.

// A lane number indexes several registers at once; iterating over one of them hides that.
#![allow(clippy::needless_range_loop)]

mod api;
pub mod async_copy;
pub mod bulk_copy;
pub mod bulk_store;
pub mod byte_mma;
pub mod counters;
pub mod driver;
pub mod fp8;
pub mod machine;
pub mod mbarrier;
pub mod printf;
pub mod ptx;
pub mod sanitize;
pub mod tensor_core;
pub mod tensor_map;
pub mod wgmma;
pub mod wmma;

pub use api::{Backend, Emulator, emulator, install};
pub use counters::Counters;
