//! Streams: all work is done when submitted, unless the stream records it for a graph.

use std::ffi::{c_int, c_uint};
use std::sync::{Arc, Mutex};

use super::error::{CuResult, ILLEGAL_STATE, STREAM_CAPTURE_UNSUPPORTED};
use super::graphs::{Body, Work};
use super::{Handle, Outcome, call, driver, lock, put};

/// A stream; `Some` while it captures.
#[derive(Default)]
pub struct Stream {
    capture: Mutex<Option<Body>>,
}

/// The null stream and the two special handles for default streams.
fn is_default(stream: Handle) -> bool {
    stream.addr() <= 2
}

fn get(stream: Handle) -> Result<Option<Arc<Stream>>, CuResult> {
    if is_default(stream) {
        Ok(None)
    } else {
        driver().streams.get(stream).map(Some)
    }
}

/// Does work, or records it if the stream captures.
pub fn submit(stream: Handle, work: Work) -> Outcome {
    submit_all(stream, std::slice::from_ref(&work))
}

/// Does several units of work in order, or records them.
pub fn submit_all(stream: Handle, work: &[Work]) -> Outcome {
    if let Some(stream) = get(stream)?
        && let Some(body) = &mut *lock(&stream.capture)
    {
        body.work.extend_from_slice(work);
        return Ok(());
    }
    driver().reports.submitted();
    work.iter().try_for_each(Work::run)
}

/// Frees memory, or leaves that to the graph if the stream captures.
pub fn submit_free(stream: Handle, address: u64) -> Outcome {
    if let Some(stream) = get(stream)?
        && let Some(body) = &mut *lock(&stream.capture)
    {
        body.freed.push(address);
        return Ok(());
    }
    Ok(driver().memory.free(address)?)
}

/// Whether a stream captures.
pub fn is_capturing(stream: Handle) -> Result<bool, CuResult> {
    Ok(get(stream)?.is_some_and(|s| lock(&s.capture).is_some()))
}

/// # Safety
/// `stream` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, _flags: c_uint) -> CuResult {
    // SAFETY: the caller's promise.
    call(|| unsafe { put(stream, driver().streams.insert(Stream::default())) })
}

/// # Safety
/// `stream` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    flags: c_uint,
    _priority: c_int,
) -> CuResult {
    // SAFETY: the caller's promise.
    unsafe { cuStreamCreate(stream, flags) }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: Handle) -> CuResult {
    call(|| Ok(driver().streams.remove(stream).map(drop)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: Handle) -> CuResult {
    call(|| {
        if is_capturing(stream)? {
            Err(STREAM_CAPTURE_UNSUPPORTED.into())
        } else {
            Ok(())
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: Handle) -> CuResult {
    cuStreamSynchronize(stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> CuResult {
    call(|| {
        get(stream)?;
        Ok(driver().events.get(event).map(drop)?)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_int) -> CuResult {
    call(|| {
        let Some(stream) = get(stream)? else {
            return Err(STREAM_CAPTURE_UNSUPPORTED.into());
        };
        let mut capture = lock(&stream.capture);
        if capture.is_some() {
            return Err(ILLEGAL_STATE.into());
        }
        *capture = Some(Body {
            work: Vec::new(),
            freed: Vec::new(),
        });
        Ok(())
    })
}

/// # Safety
/// `graph` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> CuResult {
    call(|| {
        let Some(stream) = get(stream)? else {
            return Err(ILLEGAL_STATE.into());
        };
        let body = lock(&stream.capture).take().ok_or(ILLEGAL_STATE)?;
        // SAFETY: the caller's promise.
        unsafe { put(graph, driver().graphs.insert(Arc::new(body))) }
    })
}

/// # Safety
/// `status` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) -> CuResult {
    call(|| {
        let capturing = is_capturing(stream)?;
        // SAFETY: the caller's promise.
        unsafe { put(status, c_int::from(capturing)) }
    })
}
