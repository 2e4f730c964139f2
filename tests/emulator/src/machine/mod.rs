//! The machine: warps of 32 lanes, blocks of warps, grids of blocks, and their memory.

pub mod access;
pub mod alu;
pub mod atomic;
pub mod block;
pub mod call;
pub mod checks;
pub mod cluster;
pub mod convert;
pub mod exact;
pub mod float;
pub mod integer;
pub mod launch;
pub mod memory;
pub mod registers;
pub mod rounding;
pub mod shared;
pub mod warp;
pub mod warp_ops;
