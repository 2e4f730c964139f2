//! Events: points in host time.

use std::ffi::c_uint;
use std::sync::Mutex;
use std::time::Instant;

use super::error::{CuResult, INVALID_HANDLE};
use super::streams::is_capturing;
use super::{Handle, call, driver, lock, put};

/// An event; None until recorded.
#[derive(Default)]
pub struct Event {
    at: Mutex<Option<Instant>>,
}

/// # Safety
/// `event` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut Handle, _flags: c_uint) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(event, driver().events.insert(Event::default())) })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: Handle) -> CuResult {
    call(|| Ok(driver().events.remove(event).map(drop)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> CuResult {
    call(|| {
        let event = driver().events.get(event)?;
        if !is_capturing(stream)? {
            *lock(&event.at) = Some(Instant::now());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: Handle) -> CuResult {
    call(|| Ok(driver().events.get(event).map(drop)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: Handle) -> CuResult {
    cuEventQuery(event)
}

/// # Safety
/// `milliseconds` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(
    milliseconds: *mut f32,
    start: Handle,
    end: Handle,
) -> CuResult {
    call(|| {
        let time = |event: Handle| -> Result<Instant, CuResult> {
            let at = *lock(&driver().events.get(event)?.at);
            at.ok_or(INVALID_HANDLE)
        };
        let (start, end) = (time(start)?, time(end)?);
        let forward = end.checked_duration_since(start).map(|d| d.as_secs_f64());
        let seconds = forward.unwrap_or_else(|| -start.duration_since(end).as_secs_f64());
        // SAFETY: the caller's promise.
        unsafe { put(milliseconds, (seconds * 1e3) as f32) }
    })
}

/// # Safety
/// `milliseconds` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime(
    milliseconds: *mut f32,
    start: Handle,
    end: Handle,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuEventElapsedTime_v2(milliseconds, start, end) }
}
