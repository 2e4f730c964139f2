//! Function attributes and occupancy.

use std::ffi::{c_int, c_uint};
use std::sync::atomic::Ordering::Relaxed;

use super::device::MAX_THREADS;
use super::error::{CuResult, INVALID_VALUE, SUCCESS};
use super::kernels::{
    Kernel, LaunchConfig, PORTABLE_CLUSTER, check, shape_of, with_required_cluster,
};
use super::{Handle, call, driver, put};
use crate::sanitize::shared::MAX_CLUSTER;

/// Shared memory of each block that the system keeps for itself.
const SYSTEM_SHARED: u32 = 1024;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MAX_DYNAMIC_SHARED: c_int = 8;
/// `CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH`; height and depth follow.
const REQUIRED_CLUSTER: c_int = 11;
/// `CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED`.
const NON_PORTABLE_CLUSTER: c_int = 14;

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
            REQUIRED_CLUSTER..=13 => {
                let axis = (attribute - REQUIRED_CLUSTER) as usize;
                f.cluster.map_or(0, |cluster| cluster[axis])
            }
            NON_PORTABLE_CLUSTER => u32::from(kernel.any_cluster_size.load(Relaxed)),
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
            NON_PORTABLE_CLUSTER => {
                kernel.any_cluster_size.store(value != 0, Relaxed);
                Ok(())
            }
            // Carve-out preference and scheduling policy are hints here; a launch gives its
            // cluster size itself.
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
pub fn blocks_per_sm(kernel: &Kernel, threads: u32, dynamic_shared: usize) -> u32 {
    let device = &driver().device;
    let by_threads = device.threads_per_sm / threads.max(1).next_multiple_of(32);
    let dynamic = u32::try_from(dynamic_shared).unwrap_or(u32::MAX);
    let shared = kernel
        .function()
        .shared_bytes(dynamic)
        .saturating_add(SYSTEM_SHARED);
    let by_shared = device.shared_per_sm / shared;
    by_threads.min(by_shared).min(device.blocks_per_sm)
}

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
        let threads = u32::try_from(block_size)
            .ok()
            .filter(|&t| t > 0)
            .ok_or(INVALID_VALUE)?;
        let fit = blocks_per_sm(&kernel, threads, dynamic_shared);
        // SAFETY: the caller's promise.
        unsafe { put(blocks, fit as c_int) }
    })
}

/// Clusters of a launch that run at once. SMs are taken to be free to form any cluster, so a
/// GPU, whose clusters lie within its processing clusters, may run fewer.
///
/// # Safety
/// `clusters` is null or writable; `config` is null or valid with its attributes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxActiveClusters(
    clusters: *mut c_int,
    function: Handle,
    config: *const LaunchConfig,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        // SAFETY: the caller's promise.
        let Some((shape, _)) = (unsafe { shape_of(config) }) else {
            return Err(INVALID_VALUE.into());
        };
        let shape = with_required_cluster(&kernel, shape);
        check(&kernel, &shape)?;
        let threads = shape.block.iter().product();
        let blocks = blocks_per_sm(&kernel, threads, shape.dynamic_shared as usize);
        let size: u32 = shape.cluster.iter().product();
        let fit = blocks * driver().device.sm_count / size;
        // SAFETY: the caller's promise.
        unsafe { put(clusters, fit as c_int) }
    })
}

/// The largest cluster a kernel may be launched with.
///
/// # Safety
/// As for [`cuOccupancyMaxActiveClusters`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialClusterSize(
    size: *mut c_int,
    function: Handle,
    config: *const LaunchConfig,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        // SAFETY: the caller's promise.
        let Some((shape, _)) = (unsafe { shape_of(config) }) else {
            return Err(INVALID_VALUE.into());
        };
        let threads = shape.block.iter().product();
        let most = match blocks_per_sm(&kernel, threads, shape.dynamic_shared as usize) {
            _ if driver().device.major < 9 => 1,
            0 => 0,
            _ if kernel.any_cluster_size.load(Relaxed) => MAX_CLUSTER as u64,
            _ => PORTABLE_CLUSTER,
        };
        // SAFETY: the caller's promise.
        unsafe { put(size, most as c_int) }
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

/// Shared memory a block may ask for at launch if `blocks` of them are to fit on an SM.
///
/// # Safety
/// `bytes` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyAvailableDynamicSMemPerBlock(
    bytes: *mut usize,
    function: Handle,
    blocks: c_int,
    block_size: c_int,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        let positive = |n: c_int| u32::try_from(n).ok().filter(|&n| n > 0);
        let (Some(blocks), Some(threads)) = (positive(blocks), positive(block_size)) else {
            return Err(INVALID_VALUE.into());
        };
        let device = &driver().device;
        if blocks_per_sm(&kernel, threads, 0) < blocks {
            return Err(INVALID_VALUE.into());
        }
        let share = (device.shared_per_sm / blocks).saturating_sub(SYSTEM_SHARED);
        let whole = share.min(device.shared_opt_in);
        let left = whole.saturating_sub(kernel.function().shared_bytes(0));
        // SAFETY: the caller's promise.
        unsafe { put(bytes, left as usize) }
    })
}

/// Dynamic shared memory of a block of this many threads.
type SharedOfBlock = extern "C" fn(c_int) -> usize;

/// The block size with which most threads fit on an SM, the largest one if several do, and the
/// blocks of it that fill the device.
///
/// # Safety
/// `grid` and `block` are null or writable; `shared` is null or a function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSize(
    grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared: Option<SharedOfBlock>,
    dynamic_shared: usize,
    limit: c_int,
) -> CuResult {
    call(|| {
        let kernel = driver().functions.get(function)?;
        let most = kernel
            .function()
            .max_threads
            .map_or(MAX_THREADS, |t| t.iter().map(|&n| n.max(1)).product());
        let most = match u32::try_from(limit).map_err(|_| INVALID_VALUE)? {
            0 => most,
            limit => most.min(limit),
        };
        let fit = |threads: u32| {
            let bytes = shared.map_or(dynamic_shared, |f| f(threads as c_int));
            blocks_per_sm(&kernel, threads, bytes)
        };
        let threads = (1..=most / 32)
            .map(|warps| 32 * warps)
            .max_by_key(|&t| (t * fit(t), t))
            .ok_or(INVALID_VALUE)?;
        // SAFETY: the caller's promise.
        unsafe {
            put(grid, (fit(threads) * driver().device.sm_count) as c_int)?;
            put(block, threads as c_int)
        }
    })
}

/// # Safety
/// As for [`cuOccupancyMaxPotentialBlockSize`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuOccupancyMaxPotentialBlockSizeWithFlags(
    grid: *mut c_int,
    block: *mut c_int,
    function: Handle,
    shared: Option<SharedOfBlock>,
    dynamic_shared: usize,
    limit: c_int,
    _flags: c_uint,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe {
        cuOccupancyMaxPotentialBlockSize(grid, block, function, shared, dynamic_shared, limit)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAdvise_v2() -> CuResult {
    SUCCESS
}
