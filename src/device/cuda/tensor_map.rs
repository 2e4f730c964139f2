use std::ptr;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use super::{Arg, CudaDevice};
use crate::error::{Error, Result};
use crate::tensor::DType;
use crate::tensor::cuda::error_name;

/// Rows and columns of the blocks that a kernel copies by a map: kBlock of kernels/common/wgmma.cuh.
const BLOCK: u32 = 64;

impl CudaDevice {
    /// A map of row-major bf16 values at `address`, a matrix or a pile of matrices, from which
    /// kernels copy blocks of 64 x 64 values into shared memory with the 128-byte swizzle; rows
    /// are `row` values apart. Needs compute capability 9.0.
    ///
    /// # Errors
    /// What the driver does not take: an extent of 0, rows that do not begin at multiples of 16
    /// bytes.
    pub(crate) fn block_map(&self, address: u64, shape: &[usize], row: usize) -> Result<Arg> {
        let mut map = CUtensorMap { opaque: [0; 16] };
        // The driver counts dimensions from the last one.
        let extents: Vec<u64> = shape.iter().rev().map(|&extent| extent as u64).collect();
        let mut stride = (row * DType::Bf16.size()) as u64;
        let mut strides = vec![stride];
        strides.extend(extents[1..].iter().map(|extent| {
            stride *= extent;
            stride
        }));
        let mut block = vec![1; shape.len()];
        block.iter_mut().take(2).for_each(|side| *side = BLOCK);
        let steps = vec![1; shape.len()];
        // SAFETY: the arrays have an entry for each dimension, and outlive the call; the address
        // is not read through.
        let code = unsafe {
            cuTensorMapEncodeTiled(
                &mut map,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                shape.len() as u32,
                ptr::without_provenance_mut(address as usize),
                extents.as_ptr(),
                strides.as_ptr(),
                block.as_ptr(),
                steps.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match code.result() {
            Ok(()) => Ok(Arg::Struct(map.opaque)),
            Err(e) => {
                let values = format!("bfloat16 {shape:?} at {address:#x}");
                let what = format!("no tensor map of {values}: {}", error_name(e));
                Err(Error::cuda(self.ordinal(), what))
            }
        }
    }
}
