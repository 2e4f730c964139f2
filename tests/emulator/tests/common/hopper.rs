//! Running on a Hopper device, and tensor maps.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};

use super::{context, emulated};

/// Runs `body` on a Hopper device: in a child process that emulates one, or on the GPU.
pub fn on_hopper(test: &str, body: fn(&Arc<CudaStream>)) {
    if !emulated() {
        let context = context();
        if context.compute_capability().unwrap() == (9, 0) {
            body(&context.default_stream());
        }
        return;
    }
    if std::env::var("CUDA_EMU_DEVICE").is_ok_and(|d| d == "h100") {
        return body(&context().default_stream());
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env("CUDA_EMU_DEVICE", "h100")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A tensor map as a kernel parameter.
#[repr(C)]
pub struct Map(pub sys::CUtensorMap);
// SAFETY: kernels take the 128 bytes by value.
unsafe impl DeviceRepr for Map {}

/// A map over a tensor of 2-byte elements; dimensions innermost first.
pub fn map<T>(
    stream: &Arc<CudaStream>,
    data: &CudaSlice<T>,
    dims: &[u64],
    boxed: &[u32],
    swizzle: sys::CUtensorMapSwizzle,
) -> Map {
    let mut strides = Vec::new();
    let mut stride = 2;
    for &d in &dims[..dims.len() - 1] {
        stride *= d;
        strides.push(stride);
    }
    let steps = vec![1u32; dims.len()];
    // SAFETY: all bit patterns are valid for the opaque bytes.
    let mut out: sys::CUtensorMap = unsafe { std::mem::zeroed() };
    // SAFETY: the arrays have the lengths the rank says.
    let code = unsafe {
        sys::cuTensorMapEncodeTiled(
            &mut out,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            dims.len() as u32,
            data.device_ptr(stream).0 as *mut _,
            dims.as_ptr(),
            strides.as_ptr(),
            boxed.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    assert_eq!(code, CUresult::CUDA_SUCCESS);
    Map(out)
}

pub const SWIZZLE_NONE: sys::CUtensorMapSwizzle =
    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE;
pub const SWIZZLE_32: sys::CUtensorMapSwizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B;
pub const SWIZZLE_64: sys::CUtensorMapSwizzle = sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B;
pub const SWIZZLE_128: sys::CUtensorMapSwizzle =
    sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B;
