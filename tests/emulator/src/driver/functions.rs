//! Function attributes and occupancy.

use std::ffi::{c_int, c_uint};
use std::sync::atomic::Ordering::Relaxed;

use super::device::MAX_THREADS;
use super::error::{CuResult, INVALID_VALUE, SUCCESS};
use super::{Handle, call, driver, put};

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;

/// # Safety
/// `value` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    function: Handle,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        let f = kernel.function();
        let (version, target) = kernel.versions();
        let found = match attribute {
            0 => f
                .max_threads
                .map_or(MAX_THREADS, |t| t.iter().map(|&n| n.max(1)).product()),
            1 => f.shared_size,
            2 | 7 | 9..=16 => 0,
            3 => f.local_size,
            // Registers are the assembler's choice; PTX does not tell.
            4 => 0,
            5 => version,
            6 => target,
            MAX_DYNAMIC_SHARED => kernel.max_dynamic_shared.load(Relaxed),
            _ => return Err(INVALID_VALUE.into()),
        };
        // SAFETY: the caller's promise.
        unsafe { put(value, found as c_int) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        match attribute {
            MAX_DYNAMIC_SHARED => {
                let bytes = u32::try_from(value).map_err(|_| INVALID_VALUE)?;
                Ok(kernel.set_dynamic_shared(bytes)?)
            }
            // Carve-out preference and cluster attributes are hints here.
            9..=16 => Ok(()),
            _ => Err(INVALID_VALUE.into()),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: c_int) -> CuResult {
    call(|| Ok(driver().functions.get(function).map(drop)?))
}

/// Blocks of a kernel that fit on an SM, as far as threads and shared memory decide.
///
/// # Safety
/// `blocks` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: *mut c_int,
    function: Handle,
    block_size: c_int,
    dynamic_shared: usize,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        let device = &driver().device;
        let threads = u32::try_from(block_size)
            .ok()
            .filter(|&t| t > 0)
            .ok_or(INVALID_VALUE)?;
        let by_threads = device.threads_per_sm / threads.next_multiple_of(32);
        // A block also costs 1 KiB the system keeps.
        let shared = kernel.function().dynamic_shared as usize + dynamic_shared + 1024;
        let by_shared = (device.shared_per_sm as usize / shared) as u32;
        let fit = by_threads.min(by_shared).min(device.blocks_per_sm);
        // SAFETY: the caller's promise.
        unsafe { put(blocks, fit as c_int) }
    })
}

/// # Safety
/// `blocks` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: *mut c_int,
    function: Handle,
    block_size: c_int,
    dynamic_shared: usize,
    _flags: c_uint,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe {
        cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, block_size, dynamic_shared)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAdvise_v2() -> CuResult {
    SUCCESS
}
