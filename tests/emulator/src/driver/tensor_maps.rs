//! `cuTensorMapEncodeTiled`.

use std::ffi::{c_int, c_uint};

use super::error::{CuResult, INVALID_VALUE, NOT_SUPPORTED};
use super::{call, driver, put};
use crate::tensor_map::{BYTES, MAX_RANK, Swizzle, TensorMap};

/// Bytes of a `CUtensorMapDataType`.
fn element_bytes(data_type: c_int) -> Option<u32> {
    Some(match data_type {
        0 => 1,
        1 | 6 | 9 => 2,
        2 | 3 | 7 | 10..=12 => 4,
        4 | 5 | 8 => 8,
        _ => return None,
    })
}

/// # Safety
/// `map` is writable for 128 bytes; the arrays hold `rank` entries, the strides one less.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut [u64; BYTES / 8],
    data_type: c_int,
    rank: c_uint,
    base: u64,
    dims: *const u64,
    strides: *const u64,
    box_dims: *const u32,
    element_strides: *const u32,
    interleave: c_int,
    swizzle: c_uint,
    _promotion: c_int,
    fill: c_int,
) -> CuResult {
    call(|| {
        let rank = rank as usize;
        if driver().device.major < 9 || interleave != 0 || fill != 0 {
            return Err(NOT_SUPPORTED.into());
        }
        let size = element_bytes(data_type).ok_or(INVALID_VALUE)?;
        let swizzle = Swizzle::from_code(swizzle).ok_or(INVALID_VALUE)?;
        if !(1..=MAX_RANK).contains(&rank)
            || dims.is_null()
            || box_dims.is_null()
            || element_strides.is_null()
        {
            return Err(INVALID_VALUE.into());
        }
        let mut tensor = TensorMap {
            base,
            rank,
            data_type: data_type as u32,
            element_bytes: size,
            dims: [1; MAX_RANK],
            strides: [size.into(); MAX_RANK],
            box_dims: [1; MAX_RANK],
            element_strides: [1; MAX_RANK],
            swizzle,
        };
        for i in 0..rank {
            // SAFETY: the arrays hold `rank` entries by the caller's promise.
            unsafe {
                tensor.dims[i] = *dims.add(i);
                tensor.box_dims[i] = *box_dims.add(i);
                tensor.element_strides[i] = *element_strides.add(i);
            }
            if i > 0 {
                if strides.is_null() {
                    return Err(INVALID_VALUE.into());
                }
                // SAFETY: there are `rank - 1` strides by the caller's promise.
                tensor.strides[i] = unsafe { *strides.add(i - 1) };
            }
        }
        check(&tensor)?;
        // SAFETY: the caller's promise.
        unsafe { put(map, tensor.encode()) }
    })
}

/// The limits that the driver API documents.
fn check(tensor: &TensorMap) -> Result<(), CuResult> {
    let used = 0..tensor.rank;
    let dims_fit = used
        .clone()
        .all(|i| (1..=1 << 32).contains(&tensor.dims[i]));
    let boxes_fit = used
        .clone()
        .all(|i| (1..=256).contains(&tensor.box_dims[i]));
    let steps_fit = used
        .clone()
        .all(|i| (1..=8).contains(&tensor.element_strides[i]));
    let strides_fit = used
        .skip(1)
        .all(|i| tensor.strides[i].is_multiple_of(16) && tensor.strides[i] < 1 << 40);
    let row = tensor.box_dims[0] * tensor.element_bytes;
    let row_fits =
        row.is_multiple_of(16) && tensor.swizzle.row_bytes().is_none_or(|most| row <= most);
    let fits = dims_fit && boxes_fit && steps_fit && strides_fit && row_fits;
    if fits && tensor.base.is_multiple_of(16) {
        Ok(())
    } else {
        Err(INVALID_VALUE)
    }
}
