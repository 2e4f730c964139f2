//! The kernels of clusters.cu.

use std::sync::Arc;

use cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg, sys,
};

use super::hopper::{Operands, SWIZZLE_128, map};
use super::{compile, function, module};

pub fn kernel(stream: &Arc<CudaStream>, name: &str) -> CudaFunction {
    function(
        &module(stream.context(), &compile("clusters", "compute_90a")),
        name,
    )
}

/// Runs a variant of the two-block GEMM and checks the product.
pub fn gemm(stream: &Arc<CudaStream>, name: &str) -> Result<(), DriverError> {
    let (m, n, k) = (256usize, 256usize, 448usize);
    let kernel = kernel(stream, name);
    let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.set_attribute(limit, 3 * 32_768)?;
    let operands = Operands::new(stream, [m, n, k])?;
    let mut dc: CudaSlice<u16> = stream.alloc_zeros(m * n)?;
    // Half a tile of A: each block loads one for both.
    let ma = map(
        stream,
        &operands.a,
        &[k as u64, m as u64],
        &[64, 64],
        SWIZZLE_128,
    );
    let mb = map(
        stream,
        &operands.b,
        &[k as u64, n as u64],
        &[64, 128],
        SWIZZLE_128,
    );
    let (columns, depth) = (n as i32, k as i32);
    let config = LaunchConfig {
        grid_dim: (n as u32 / 128, m as u32 / 128, 1),
        block_dim: (384, 1, 1),
        shared_mem_bytes: 3 * 32_768,
    };
    let mut launch = stream.launch_builder(&kernel);
    launch
        .arg(&ma)
        .arg(&mb)
        .arg(&mut dc)
        .arg(&columns)
        .arg(&depth);
    // SAFETY: the arguments match the kernel's parameters.
    unsafe { launch.launch(config) }?;
    let c = stream.clone_dtoh(&dc)?;
    super::digest(name, &c);
    operands.check(&c);
    Ok(())
}
