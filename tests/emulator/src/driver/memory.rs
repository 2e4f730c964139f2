//! Allocations, copies and fills.

use std::alloc::Layout;
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::NonNull;

use super::context::require_context;
use super::error::{CuResult, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY, SUCCESS};
use super::graphs::Work;
use super::streams::{submit, submit_free};
use super::{Handle, Outcome, call, driver, lock, put};

/// The default stream.
const DEFAULT: Handle = std::ptr::null_mut();
/// Alignment of pinned host memory.
const PAGE: usize = 4096;

/// # Safety
/// The pointers are null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> CuResult {
    call(|| {
        require_context()?;
        let (available, all) = driver().memory.info();
        // SAFETY: the caller's promise.
        unsafe {
            put(free, available as usize)?;
            put(total, all as usize)
        }
    })
}

/// # Safety
/// `address` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, len: usize) -> CuResult {
    call(|| {
        require_context()?;
        if len == 0 {
            return Err(INVALID_VALUE.into());
        }
        let base = driver().memory.allocate(len as u64)?;
        // SAFETY: the caller's promise.
        unsafe { put(address, base) }
    })
}

/// # Safety
/// As for [`cuMemAlloc_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(
    address: *mut u64,
    len: usize,
    _stream: Handle,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuMemAlloc_v2(address, len) }
}

/// # Safety
/// As for [`cuMemAlloc_v2`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocFromPoolAsync(
    address: *mut u64,
    len: usize,
    _pool: Handle,
    _stream: Handle,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuMemAlloc_v2(address, len) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocManaged(_address: *mut u64, _len: usize, _flags: c_uint) -> CuResult {
    NOT_SUPPORTED
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> CuResult {
    cuMemFreeAsync(address, DEFAULT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, stream: Handle) -> CuResult {
    call(|| {
        if address == 0 {
            Ok(())
        } else {
            submit_free(stream, address)
        }
    })
}

/// # Safety
/// `address` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    address: *mut *mut c_void,
    len: usize,
    _flags: c_uint,
) -> CuResult {
    call(|| {
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| OUT_OF_MEMORY)?;
        if len == 0 {
            return Err(INVALID_VALUE.into());
        }
        // SAFETY: the layout's size is not zero.
        let start =
            NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }).ok_or(OUT_OF_MEMORY)?;
        lock(&driver().pinned).insert(start.as_ptr() as usize, len);
        driver().memory.register_host(start, len as u64);
        // SAFETY: the caller's promise.
        unsafe { put(address, start.as_ptr().cast()) }
    })
}

/// # Safety
/// `address` came from [`cuMemHostAlloc`] and is not used afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: *mut c_void) -> CuResult {
    call(|| {
        let len = lock(&driver().pinned)
            .remove(&(address as usize))
            .ok_or(INVALID_VALUE)?;
        driver().memory.unregister_host(address as u64);
        let layout = Layout::from_size_align(len, PAGE).map_err(|_| INVALID_VALUE)?;
        // SAFETY: the address came from alloc_zeroed with this layout, and was still registered.
        unsafe { std::alloc::dealloc(address.cast(), layout) };
        Ok(())
    })
}

/// # Safety
/// `from` is readable for `len` bytes until the work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const c_void,
    len: usize,
    stream: Handle,
) -> CuResult {
    call(|| {
        copy(
            stream,
            len,
            Work::ToDevice {
                to,
                from: from as usize,
                len,
            },
        )
    })
}

/// # Safety
/// `from` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, len: usize) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuMemcpyHtoDAsync_v2(to, from, len, DEFAULT) }
}

/// # Safety
/// `to` is writable for `len` bytes until the work is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: u64,
    len: usize,
    stream: Handle,
) -> CuResult {
    call(|| {
        copy(
            stream,
            len,
            Work::ToHost {
                to: to as usize,
                from,
                len,
            },
        )
    })
}

/// # Safety
/// `to` is writable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, len: usize) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuMemcpyDtoHAsync_v2(to, from, len, DEFAULT) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, len: usize, stream: Handle) -> CuResult {
    call(|| copy(stream, len, Work::OnDevice { to, from, len }))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, len: usize) -> CuResult {
    cuMemcpyDtoDAsync_v2(to, from, len, DEFAULT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: Handle,
    from: u64,
    from_context: Handle,
    len: usize,
    stream: Handle,
) -> CuResult {
    if to_context != from_context {
        return super::error::PEER_ACCESS_NOT_ENABLED;
    }
    cuMemcpyDtoDAsync_v2(to, from, len, stream)
}

fn copy(stream: Handle, len: usize, work: Work) -> Outcome {
    if len == 0 {
        Ok(())
    } else {
        submit(stream, work)
    }
}

fn fill(to: u64, value: u32, width: usize, count: usize, stream: Handle) -> CuResult {
    call(|| {
        if count == 0 {
            return Ok(());
        }
        if !to.is_multiple_of(width as u64) {
            return Err(INVALID_VALUE.into());
        }
        submit(
            stream,
            Work::Fill {
                to,
                pattern: value.to_le_bytes(),
                width,
                count,
            },
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: Handle) -> CuResult {
    fill(to, value.into(), 1, count, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, value: u8, count: usize) -> CuResult {
    fill(to, value.into(), 1, count, DEFAULT)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: Handle) -> CuResult {
    fill(to, value.into(), 2, count, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) -> CuResult {
    fill(to, value, 4, count, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32_v2(to: u64, value: u32, count: usize) -> CuResult {
    fill(to, value, 4, count, DEFAULT)
}

/// # Safety
/// `pool` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut Handle, _device: c_int) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(pool, std::ptr::without_provenance_mut(0x20)) })
}

/// # Safety
/// `pool` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetMemPool(pool: *mut Handle, device: c_int) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuDeviceGetDefaultMemPool(pool, device) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(_pool: Handle, _keep: usize) -> CuResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(
    _pool: Handle,
    _attribute: c_int,
    _value: *mut c_void,
) -> CuResult {
    SUCCESS
}
