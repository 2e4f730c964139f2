//! The driver API on top of the machine: the functions cudarc calls, by their C names.
//!
//! Work is done when it is submitted, so streams are always in order and idle; a finding is
//! returned by the launch that made it, and does not spoil the context.

// The C API's names are what programs look up.
#![allow(non_snake_case)]

mod context;
pub mod device;
pub mod error;
mod events;
mod functions;
mod graphs;
pub mod image;
mod kernels;
mod lz4;
mod memory;
mod modules;
pub mod report;
mod streams;
mod tensor_maps;
mod unsupported;

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::machine::alu::{self, Alu};
use crate::machine::memory::{Memory, MemoryError};
use device::Device;
use error::{CuResult, INVALID_HANDLE, INVALID_VALUE, OUT_OF_MEMORY};

/// An opaque handle as C sees it.
pub type Handle = *mut std::ffi::c_void;

/// A locked mutex; every update leaves the data consistent, so poisoning is no obstacle.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Objects by handle; handles are never reused.
struct Registry<T> {
    items: Mutex<HashMap<usize, Arc<T>>>,
}

impl<T> Registry<T> {
    fn new() -> Self {
        Self {
            items: Mutex::new(HashMap::new()),
        }
    }

    fn insert(&self, item: T) -> Handle {
        static NEXT: AtomicUsize = AtomicUsize::new(0x1000);
        let key = NEXT.fetch_add(16, Relaxed);
        lock(&self.items).insert(key, Arc::new(item));
        std::ptr::without_provenance_mut(key)
    }

    fn get(&self, handle: Handle) -> Result<Arc<T>, CuResult> {
        lock(&self.items)
            .get(&handle.addr())
            .cloned()
            .ok_or(INVALID_HANDLE)
    }

    fn retain(&self, keep: impl Fn(&T) -> bool) {
        lock(&self.items).retain(|_, item| keep(item));
    }

    fn remove(&self, handle: Handle) -> Result<Arc<T>, CuResult> {
        lock(&self.items)
            .remove(&handle.addr())
            .ok_or(INVALID_HANDLE)
    }
}

/// The process's one device and everything created on it.
struct Driver {
    device: Device,
    memory: Memory,
    alu: Alu,
    /// Seed of a random warp schedule.
    schedule: Option<u64>,
    step_limit: u64,
    /// References to the primary context.
    retained: AtomicI64,
    contexts: Registry<()>,
    modules: Registry<modules::Module>,
    functions: Registry<kernels::Kernel>,
    streams: Registry<streams::Stream>,
    events: Registry<events::Event>,
    graphs: Registry<Arc<graphs::Body>>,
    /// Pinned host memory by address, with its size.
    pinned: Mutex<HashMap<usize, usize>>,
    reports: report::Reports,
}

/// Warp instructions a block may execute before it counts as endless.
const DEFAULT_STEP_LIMIT: u64 = 1 << 34;

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.parse() {
        Ok(value) => Some(value),
        Err(_) => {
            eprintln!("cuda-emulator: {name} is `{text}`, expected a number; ignored");
            None
        }
    }
}

/// The driver, started by the first call.
fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let name = std::env::var("CUDA_EMU_DEVICE").ok();
        let device = Device::from_name(name.as_deref()).unwrap_or_else(|message| {
            eprintln!("cuda-emulator: {message}; using an A100");
            Device::from_name(None).unwrap_or_else(|_| unreachable!("the default device exists"))
        });
        report::at_exit();
        Driver {
            device,
            memory: Memory::new(device.memory),
            alu: alu::select(),
            schedule: number("CUDA_EMU_SCHEDULE"),
            step_limit: number("CUDA_EMU_STEP_LIMIT").unwrap_or(DEFAULT_STEP_LIMIT),
            retained: AtomicI64::new(0),
            contexts: Registry::new(),
            modules: Registry::new(),
            functions: Registry::new(),
            streams: Registry::new(),
            events: Registry::new(),
            graphs: Registry::new(),
            pinned: Mutex::new(HashMap::new()),
            reports: report::Reports::default(),
        }
    })
}

impl From<MemoryError> for CuResultError {
    fn from(error: MemoryError) -> Self {
        CuResultError(match error {
            MemoryError::InvalidAddress => INVALID_VALUE,
            MemoryError::OutOfMemory => OUT_OF_MEMORY,
        })
    }
}

/// A code as the error of `?`.
struct CuResultError(CuResult);

impl From<CuResult> for CuResultError {
    fn from(code: CuResult) -> Self {
        Self(code)
    }
}

type Outcome = Result<(), CuResultError>;

/// Runs the body of a driver call and returns its code.
fn call(body: impl FnOnce() -> Outcome) -> CuResult {
    match body() {
        Ok(()) => error::SUCCESS,
        Err(CuResultError(code)) => code,
    }
}

/// Stores a result through a pointer the caller gave.
///
/// # Safety
/// `to` is null or valid for writing one `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(INVALID_VALUE.into());
    }
    // SAFETY: not null, and writable by the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}
