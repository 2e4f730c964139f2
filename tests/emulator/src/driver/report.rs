//! What launches found and counted, for tests and benchmarks.
//!
//! The functions here are exported with C names: the shared library that CUDA programs load
//! and a copy linked into a test have separate state.

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int};
use std::io::Write;
use std::sync::Mutex;

use super::{driver, lock};
use crate::counters::Counters;
use crate::sanitize::Finding;

/// Live allocations listed at exit, in the order they were made.
const MAX_LISTED: usize = 100;

thread_local! {
    static LAST_FINDING: RefCell<String> = const { RefCell::new(String::new()) };
    static LAST_COUNTERS: RefCell<Option<(String, Counters)>> = const { RefCell::new(None) };
    static THREAD_COUNTERS: RefCell<Option<Counters>> = const { RefCell::new(None) };
    static SUBMISSIONS: Cell<u64> = const { Cell::new(0) };
}

/// Sums over all launches of the process.
#[derive(Default)]
pub struct Reports {
    totals: Mutex<Vec<(String, Counters)>>,
}

impl Reports {
    /// Notes a launch that ended well.
    pub fn counted(&self, kernel: &str, counters: Counters) {
        LAST_COUNTERS.with_borrow_mut(|last| *last = Some((kernel.to_string(), counters)));
        THREAD_COUNTERS.with_borrow_mut(|sum| sum.get_or_insert_default().add(&counters));
        write_line(&counters.to_json(kernel));
        let mut totals = lock(&self.totals);
        match totals.iter_mut().find(|(name, _)| name == kernel) {
            Some((_, total)) => total.add(&counters),
            None => totals.push((kernel.to_string(), counters)),
        }
    }

    /// Notes a call that hands work to a stream.
    pub fn submitted(&self) {
        SUBMISSIONS.set(SUBMISSIONS.get() + 1);
    }

    /// Notes a finding.
    pub fn found(&self, finding: &Finding) {
        self.message(finding.to_string());
    }

    /// Notes any other failure, such as a module that could not be loaded.
    pub fn message(&self, text: String) {
        eprintln!("cuda-emulator: {text}");
        LAST_FINDING.with_borrow_mut(|last| *last = text);
    }
}

/// Appends a line to the file `CUDA_EMU_COUNTERS` names.
fn write_line(line: &str) {
    let Ok(path) = std::env::var("CUDA_EMU_COUNTERS") else {
        return;
    };
    let written = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    if let Err(error) = written {
        eprintln!("cuda-emulator: CUDA_EMU_COUNTERS: {path}: {error}");
    }
}

/// Asks for a list of the memory that is live when the process ends, if `CUDA_EMU_LEAKS` is 1.
///
/// A program that keeps a device in a static never frees it, and a GPU's driver takes such
/// memory back without a word; so the list is for those who look for leaks.
pub fn at_exit() {
    if std::env::var("CUDA_EMU_LEAKS").as_deref() != Ok("1") {
        return;
    }
    unsafe extern "C" {
        fn atexit(callback: extern "C" fn()) -> c_int;
    }
    extern "C" fn leaks() {
        let sizes = driver().memory.live_sizes();
        if !sizes.is_empty() {
            let (count, bytes) = (sizes.len(), sizes.iter().sum::<u64>());
            eprintln!("cuda-emulator: {count} allocations of {bytes} bytes are still live at exit");
        }
        for bytes in sizes.iter().take(MAX_LISTED) {
            eprintln!("cuda-emulator:   {bytes} bytes");
        }
    }
    // SAFETY: `leaks` may run at any time after the driver was started.
    if unsafe { atexit(leaks) } != 0 {
        eprintln!("cuda-emulator: no leak report: atexit failed");
    }
}

/// Copies text with a final NUL as far as it fits; returns its full length without the NUL.
///
/// # Safety
/// `to` is null or valid for writing `capacity` bytes.
unsafe fn copy_text(text: &str, to: *mut c_char, capacity: usize) -> usize {
    if !to.is_null() && capacity > 0 {
        let len = text.len().min(capacity - 1);
        // SAFETY: `len + 1` bytes fit.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast::<u8>(), len);
            to.add(len).write(0);
        }
    }
    text.len()
}

/// Text of the last finding of a launch or module load of this thread; empty if there was none.
/// Returns its length.
///
/// # Safety
/// `to` is null or valid for writing `capacity` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_emulator_last_finding(to: *mut c_char, capacity: usize) -> usize {
    // SAFETY: the caller's promise is passed on.
    LAST_FINDING.with_borrow(|text| unsafe { copy_text(text, to, capacity) })
}

/// Forgets this thread's last finding and counters.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_emulator_reset() {
    LAST_FINDING.with_borrow_mut(String::clear);
    LAST_COUNTERS.with_borrow_mut(|last| *last = None);
    THREAD_COUNTERS.with_borrow_mut(|sum| *sum = None);
    SUBMISSIONS.set(0);
}

/// Calls by which this thread has handed work to a stream since its last `cuda_emulator_reset`:
/// each launch of a kernel or of a whole graph, each copy, each fill. What a stream records is not
/// counted.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_emulator_submissions() -> u64 {
    SUBMISSIONS.get()
}

/// Sums over this thread's launches since its last `cuda_emulator_reset`; 0 if there were none.
///
/// # Safety
/// `to` is valid for writing one [`Counters`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_emulator_thread_counters(to: *mut Counters) -> c_int {
    THREAD_COUNTERS.with_borrow(|sum| match sum {
        Some(counters) => {
            // SAFETY: the caller's promise.
            unsafe { to.write(*counters) };
            1
        }
        None => 0,
    })
}

/// Counters of this thread's last launch that ended well; 0 if there was none.
///
/// # Safety
/// `to` is valid for writing one [`Counters`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_emulator_last_counters(to: *mut Counters) -> c_int {
    LAST_COUNTERS.with_borrow(|last| match last {
        Some((_, counters)) => {
            // SAFETY: the caller's promise.
            unsafe { to.write(*counters) };
            1
        }
        None => 0,
    })
}

/// Sums per kernel over all launches of the process, one JSON object a line. Returns the
/// text's length.
///
/// # Safety
/// As for [`cuda_emulator_last_finding`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_emulator_totals(to: *mut c_char, capacity: usize) -> usize {
    let totals = lock(&driver().reports.totals);
    let lines: Vec<String> = totals.iter().map(|(name, c)| c.to_json(name)).collect();
    // SAFETY: the caller's promise is passed on.
    unsafe { copy_text(&lines.join("\n"), to, capacity) }
}

/// Number of live device allocations; their bytes go to `bytes` unless it is null.
///
/// # Safety
/// `bytes` is null or valid for writing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuda_emulator_live_allocations(bytes: *mut u64) -> usize {
    let (count, live) = driver().memory.live();
    if !bytes.is_null() {
        // SAFETY: not null, and writable by the caller's promise.
        unsafe { bytes.write(live) };
    }
    count
}
