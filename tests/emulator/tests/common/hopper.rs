//! Running on a Hopper device, and tensor maps.

use std::sync::Arc;

use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, DriverError};
use half::bf16;

use super::{context, emulated, noise};

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
    print!("{}", String::from_utf8_lossy(&output.stdout));
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

/// Operands of C = A Bᵀ in bf16 on the device: A is m x k, B is n x k.
pub struct Operands {
    pub a: CudaSlice<u16>,
    pub b: CudaSlice<u16>,
    values: [Vec<bf16>; 2],
    shape: [usize; 3],
}

impl Operands {
    /// Noise of shape [m, n, k].
    pub fn new(stream: &Arc<CudaStream>, shape: [usize; 3]) -> Result<Self, DriverError> {
        let [m, n, k] = shape;
        let values = [(1, m * k), (2, n * k)].map(|(seed, count)| -> Vec<bf16> {
            noise(seed, count).into_iter().map(bf16::from_f32).collect()
        });
        let bits = |x: &[bf16]| x.iter().map(|v| v.to_bits()).collect::<Vec<u16>>();
        Ok(Self {
            a: stream.clone_htod(&bits(&values[0]))?,
            b: stream.clone_htod(&bits(&values[1]))?,
            values,
            shape,
        })
    }

    /// Compares bf16 results with the product in f64.
    pub fn check(&self, c: &[u16]) {
        let ([_, n, k], [a, b]) = (self.shape, &self.values);
        for (i, &got) in c.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let products = (0..k).map(|d| a[row * k + d].to_f64() * b[column * k + d].to_f64());
            let exact: f64 = products.sum();
            let got = bf16::from_bits(got).to_f64();
            assert!(
                (got - exact).abs() < exact.abs() / 200.0 + 1e-3,
                "({row}, {column}): {got}, {exact}"
            );
        }
    }
}
