//! Initialisation, devices and contexts.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::Ordering::Relaxed;

use super::error::{
    CuResult, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, PEER_ACCESS_UNSUPPORTED,
    SUCCESS,
};
use super::{Handle, call, driver, put};

/// Handle of the primary context.
const PRIMARY: usize = 0x10;
/// CUDA version the driver claims: 13.0.
const VERSION: c_int = 13000;

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

fn check_device(device: c_int) -> Result<(), CuResult> {
    if device == 0 {
        Ok(())
    } else {
        Err(INVALID_DEVICE)
    }
}

/// Whether the calling thread has a context.
pub fn require_context() -> Result<(), CuResult> {
    if CURRENT.get() == 0 {
        Err(INVALID_CONTEXT)
    } else {
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: c_uint) -> CuResult {
    if std::env::var("CUDA_EMU_DEVICE").is_ok_and(|name| name == "none") {
        return NO_DEVICE;
    }
    driver();
    if flags == 0 { SUCCESS } else { INVALID_VALUE }
}

/// # Safety
/// `version` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(version, VERSION) })
}

/// # Safety
/// `device` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> CuResult {
    call(|| {
        check_device(ordinal)?;
        // SAFETY: the caller's promise.
        unsafe { put(device, ordinal) }
    })
}

/// # Safety
/// `count` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(count, 1) })
}

/// # Safety
/// `name` is valid for writing `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> CuResult {
    call(|| {
        check_device(device)?;
        let Some(room) = usize::try_from(len).ok().and_then(|l| l.checked_sub(1)) else {
            return Err(INVALID_VALUE.into());
        };
        let text = driver().device.name.as_bytes();
        let count = text.len().min(room);
        // SAFETY: `count + 1` bytes fit into the caller's buffer.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast::<u8>(), count);
            put(name.add(count), 0)
        }
    })
}

/// # Safety
/// `bytes` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> CuResult {
    call(|| {
        check_device(device)?;
        // SAFETY: the caller's promise.
        unsafe { put(bytes, driver().device.memory as usize) }
    })
}

/// # Safety
/// `value` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> CuResult {
    call(|| {
        check_device(device)?;
        // SAFETY: the caller's promise.
        unsafe { put(value, driver().device.attribute(attribute) as c_int) }
    })
}

/// # Safety
/// `uuid` is null or valid for writing 16 bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> CuResult {
    call(|| {
        check_device(device)?;
        // SAFETY: the caller's promise.
        unsafe { put(uuid, *b"cuda-emulator-00") }
    })
}

/// # Safety
/// `value` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(
    value: *mut c_int,
    device: c_int,
    peer: c_int,
) -> CuResult {
    call(|| {
        check_device(device)?;
        check_device(peer)?;
        // SAFETY: the caller's promise.
        unsafe { put(value, 0) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxEnablePeerAccess(_peer: Handle, _flags: c_uint) -> CuResult {
    PEER_ACCESS_UNSUPPORTED
}

/// # Safety
/// `context` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> CuResult {
    call(|| {
        check_device(device)?;
        driver().retained.fetch_add(1, Relaxed);
        // SAFETY: the caller's promise.
        unsafe { put(context, std::ptr::without_provenance_mut(PRIMARY)) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> CuResult {
    call(|| {
        check_device(device)?;
        if driver().retained.fetch_sub(1, Relaxed) <= 0 {
            driver().retained.fetch_add(1, Relaxed);
            return Err(INVALID_CONTEXT.into());
        }
        Ok(())
    })
}

/// # Safety
/// `context` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(context, std::ptr::without_provenance_mut(CURRENT.get())) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: Handle) -> CuResult {
    call(|| {
        let known = matches!(context.addr(), 0 | PRIMARY);
        if !known && driver().contexts.get(context).is_err() {
            return Err(INVALID_CONTEXT.into());
        }
        CURRENT.set(context.addr());
        Ok(())
    })
}

/// # Safety
/// `device` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> CuResult {
    call(|| {
        require_context()?;
        // SAFETY: the caller's promise.
        unsafe { put(device, 0) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> CuResult {
    call(|| Ok(require_context()?))
}

/// # Safety
/// `context` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxCreate_v4(
    context: *mut Handle,
    _params: *mut c_void,
    _flags: c_uint,
    device: c_int,
) -> CuResult {
    call(|| {
        check_device(device)?;
        let handle = driver().contexts.insert(());
        CURRENT.set(handle.addr());
        // SAFETY: the caller's promise.
        unsafe { put(context, handle) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(context: Handle) -> CuResult {
    call(|| {
        driver().contexts.remove(context)?;
        if CURRENT.get() == context.addr() {
            CURRENT.set(0);
        }
        Ok(())
    })
}

/// # Safety
/// The pointers are null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(
    least: *mut c_int,
    greatest: *mut c_int,
) -> CuResult {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe {
            put(least, 0)?;
            put(greatest, -5)
        }
    })
}

/// # Safety
/// `value` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetLimit(value: *mut usize, _limit: c_int) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(value, 0) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetLimit(_limit: c_int, _value: usize) -> CuResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetFlags(_flags: c_uint) -> CuResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCacheConfig(_config: c_int) -> CuResult {
    SUCCESS
}

/// # Safety
/// `config` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetCacheConfig(config: *mut c_int) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(config, 0) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStart() -> CuResult {
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuProfilerStop() -> CuResult {
    SUCCESS
}
