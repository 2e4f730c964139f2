//! Units of work, and graphs of them recorded by stream capture.

use std::ffi::{c_uint, c_ulonglong, c_void};
use std::sync::Arc;

use super::error::CuResult;
use super::kernels::Prepared;
use super::streams::submit_all;
use super::{CuResultError, Handle, call, driver, put};

/// Something submitted to a stream.
#[derive(Clone)]
pub enum Work {
    Launch(Arc<Prepared>),
    /// Host addresses are kept as numbers: they are the caller's until the work is done.
    ToDevice {
        to: u64,
        from: usize,
        len: usize,
    },
    ToHost {
        to: usize,
        from: u64,
        len: usize,
    },
    OnDevice {
        to: u64,
        from: u64,
        len: usize,
    },
    Fill {
        to: u64,
        pattern: [u8; 4],
        width: usize,
        count: usize,
    },
    Host {
        function: extern "C" fn(*mut c_void),
        data: usize,
    },
}

impl Work {
    /// Does it now.
    pub fn run(&self) -> Result<(), CuResultError> {
        let memory = &driver().memory;
        match self {
            Work::Launch(prepared) => prepared.run()?,
            Work::ToDevice { to, from, len } => {
                // SAFETY: the caller of the copy promised `len` readable bytes there.
                let bytes = unsafe { std::slice::from_raw_parts(*from as *const u8, *len) };
                memory.write(*to, bytes)?;
            }
            Work::ToHost { to, from, len } => {
                // SAFETY: the caller of the copy promised `len` writable bytes there.
                let bytes = unsafe { std::slice::from_raw_parts_mut(*to as *mut u8, *len) };
                memory.read(*from, bytes)?;
            }
            Work::OnDevice { to, from, len } => memory.copy(*to, *from, *len as u64)?,
            Work::Fill {
                to,
                pattern,
                width,
                count,
            } => memory.fill(*to, &pattern[..*width], *count as u64)?,
            Work::Host { function, data } => function(*data as *mut c_void),
        }
        Ok(())
    }
}

/// The work of a graph, and memory whose freeing was captured: it lives as long as the graph.
pub struct Body {
    pub work: Vec<Work>,
    pub freed: Vec<u64>,
}

impl Drop for Body {
    fn drop(&mut self) {
        for &address in &self.freed {
            // Freed twice by the program: the first time counted.
            let _ = driver().memory.free(address);
        }
    }
}

/// # Safety
/// `exec` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    exec: *mut Handle,
    graph: Handle,
    _flags: c_ulonglong,
) -> CuResult {
    call(|| {
        let body = driver().graphs.get(graph)?;
        // SAFETY: the caller's promise.
        unsafe { put(exec, driver().graphs.insert((*body).clone())) }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphUpload(exec: Handle, _stream: Handle) -> CuResult {
    call(|| Ok(driver().graphs.get(exec).map(drop)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphLaunch(exec: Handle, stream: Handle) -> CuResult {
    call(|| submit_all(stream, &driver().graphs.get(exec)?.work))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphExecDestroy(exec: Handle) -> CuResult {
    call(|| Ok(driver().graphs.remove(exec).map(drop)?))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGraphDestroy(graph: Handle) -> CuResult {
    call(|| Ok(driver().graphs.remove(graph).map(drop)?))
}

/// # Safety
/// `count` is null or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(
    graph: Handle,
    _nodes: *mut Handle,
    count: *mut usize,
) -> CuResult {
    call(|| {
        let body = driver().graphs.get(graph)?;
        // SAFETY: the caller's promise.
        unsafe { put(count, body.work.len()) }
    })
}

/// # Safety
/// `stream` is a stream's handle; `data` is what `function` expects.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    stream: Handle,
    function: extern "C" fn(*mut c_void),
    data: *mut c_void,
) -> CuResult {
    call(|| {
        super::streams::submit(
            stream,
            Work::Host {
                function,
                data: data as usize,
            },
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamAttachMemAsync(
    _stream: Handle,
    _address: u64,
    _len: usize,
    _flags: c_uint,
) -> CuResult {
    super::error::NOT_SUPPORTED
}
