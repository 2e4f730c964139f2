use std::ptr;

use cudarc::driver::DriverError;
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use super::{Arg, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor::cuda::error_name;

/// Rows and columns of the blocks that a kernel copies by a map (kernels/common/wgmma.cuh).
const BLOCK: u32 = 64;

impl CudaDevice {
    /// A map of a row-major bf16 matrix at `address`, from which kernels copy blocks of 64 x 64
    /// values into shared memory with the 128-byte swizzle. Needs compute capability 9.0.
    ///
    /// # Errors
    /// What the driver does not take: an empty matrix, rows that do not begin at multiples of
    /// 16 bytes.
    pub(crate) fn block_map(&self, address: u64, rows: usize, cols: usize) -> Result<Arg> {
        let mut map = CUtensorMap { opaque: [0; 16] };
        let extents = [cols as u64, rows as u64];
        let strides = [(cols * DType::Bf16.size()) as u64];
        let (blocks, steps) = ([BLOCK; 2], [1; 2]);
        // SAFETY: the arrays have as many entries as two dimensions need, and outlive the call;
        // the address is not read through.
        let code = unsafe {
            cuTensorMapEncodeTiled(
                &mut map,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                ptr::without_provenance_mut(address as usize),
                extents.as_ptr(),
                strides.as_ptr(),
                blocks.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match code.result() {
            Ok(()) => Ok(Arg::Struct(map.opaque)),
            Err(e) => Err(self.no_map(e, address, rows, cols)),
        }
    }

    fn no_map(&self, error: DriverError, address: u64, rows: usize, cols: usize) -> Error {
        let matrix = format!("a bfloat16 matrix [{rows}, {cols}] at {address:#x}");
        let what = format!("no tensor map of {matrix}: {}", error_name(error));
        Error::cuda(self.ordinal(), what)
    }
}
