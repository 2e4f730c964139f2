//! Loading the emulator into a process and reading what it found and counted.

use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use libloading::{Library, Symbol};

use crate::counters::Counters;

/// Which driver CUDA calls of this process reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// The installed NVIDIA driver.
    Gpu,
    /// The emulator.
    Emulator,
}

/// Names under which NVIDIA's driver is installed.
const DRIVER_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

/// A handle to the emulator that the process has loaded.
#[derive(Debug)]
pub struct Emulator {
    library: Library,
}

/// Makes CUDA calls work in this process: through the installed driver if there is one, else
/// through the emulator. `RESA_CUDA=emulator` or `gpu` forces one. Call it before the first
/// CUDA call; later calls return what the first one decided.
///
/// # Errors
/// `RESA_CUDA=gpu` without a driver, an unknown value, or an emulator library that is missing.
pub fn install() -> Result<Backend, String> {
    static DECISION: OnceLock<Result<Backend, String>> = OnceLock::new();
    DECISION.get_or_init(decide).clone()
}

fn decide() -> Result<Backend, String> {
    let wanted = std::env::var("RESA_CUDA").ok();
    match wanted.as_deref() {
        Some("gpu") if driver_present() => Ok(Backend::Gpu),
        Some("gpu") => Err("RESA_CUDA=gpu, but no CUDA driver (libcuda.so.1) is installed".into()),
        None | Some("") if driver_present() => Ok(Backend::Gpu),
        None | Some("" | "emulator") => {
            emulator()?;
            Ok(Backend::Emulator)
        }
        Some(other) => Err(format!(
            "RESA_CUDA is `{other}`, expected `emulator` or `gpu`"
        )),
    }
}

fn driver_present() -> bool {
    // SAFETY: loading NVIDIA's driver runs its initialisers, which a CUDA program does anyway.
    DRIVER_NAMES
        .iter()
        .any(|name| unsafe { Library::new(name) }.is_ok_and(|library| !is_emulator(&library)))
}

fn is_emulator(library: &Library) -> bool {
    // SAFETY: the symbol is only looked up.
    unsafe { library.get::<unsafe extern "C" fn()>(b"cuda_emulator_reset\0") }.is_ok()
}

/// The emulator of this process, loaded at the first call.
///
/// # Errors
/// A library that is missing or cannot be loaded.
pub fn emulator() -> Result<&'static Emulator, String> {
    static EMULATOR: OnceLock<Result<Emulator, String>> = OnceLock::new();
    EMULATOR.get_or_init(open).as_ref().map_err(String::clone)
}

fn open() -> Result<Emulator, String> {
    let path = library_path()?;
    // SAFETY: the library is this crate's own; its initialisers do nothing.
    let library = unsafe { Library::new(&path) }.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(Emulator { library })
}

/// `libcuda_emulator.so` as `CUDA_EMU_LIBRARY` says, or beside the executable or one folder up,
/// where Cargo puts it.
fn library_path() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("CUDA_EMU_LIBRARY") {
        return Ok(path.into());
    }
    let name = format!(
        "{}cuda_emulator{}",
        std::env::consts::DLL_PREFIX,
        std::env::consts::DLL_SUFFIX
    );
    let executable = std::env::current_exe().map_err(|e| format!("path of the executable: {e}"))?;
    let folders: Vec<PathBuf> = executable
        .ancestors()
        .skip(1)
        .take(2)
        .map(PathBuf::from)
        .collect();
    let candidates = folders
        .iter()
        .flat_map(|f| [f.join(&name), f.join("deps").join(&name)]);
    let found = candidates.clone().find(|p| p.is_file());
    found.ok_or_else(|| {
        let tried: Vec<String> = candidates.map(|p| p.display().to_string()).collect();
        format!(
            "the emulator's library was not found; tried {}",
            tried.join(", ")
        )
    })
}

impl Emulator {
    fn symbol<T>(&self, name: &'static [u8]) -> Option<Symbol<'_, T>> {
        // SAFETY: callers ask for the types the functions are exported with in `driver::report`.
        unsafe { self.library.get(name) }.ok()
    }

    fn text(&self, name: &'static [u8]) -> String {
        type Reader = unsafe extern "C" fn(*mut c_char, usize) -> usize;
        let Some(read) = self.symbol::<Reader>(name) else {
            return String::new();
        };
        // SAFETY: a null buffer asks for the length alone.
        let len = unsafe { read(std::ptr::null_mut(), 0) };
        let mut bytes = vec![0u8; len + 1];
        // SAFETY: the buffer has the room it is said to have.
        unsafe { read(bytes.as_mut_ptr().cast(), bytes.len()) };
        bytes.truncate(len);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Text of this thread's last finding or load error; empty if there was none.
    pub fn last_finding(&self) -> String {
        self.text(b"cuda_emulator_last_finding\0")
    }

    /// Counters per kernel over all launches of the process, one JSON object a line.
    pub fn totals(&self) -> String {
        self.text(b"cuda_emulator_totals\0")
    }

    /// Forgets this thread's last finding and counters.
    pub fn reset(&self) {
        if let Some(reset) = self.symbol::<extern "C" fn()>(b"cuda_emulator_reset\0") {
            reset();
        }
    }

    /// Counters of this thread's last launch that ended well.
    pub fn last_counters(&self) -> Option<Counters> {
        self.counters(b"cuda_emulator_last_counters\0")
    }

    /// Sums over this thread's launches that ended well since it last called [`Self::reset`].
    pub fn thread_counters(&self) -> Option<Counters> {
        self.counters(b"cuda_emulator_thread_counters\0")
    }

    fn counters(&self, name: &'static [u8]) -> Option<Counters> {
        type Reader = unsafe extern "C" fn(*mut Counters) -> c_int;
        let read = self.symbol::<Reader>(name)?;
        let mut counters = Counters::default();
        // SAFETY: the pointer leads to one Counters.
        let found = unsafe { read(&mut counters) };
        (found != 0).then_some(counters)
    }

    /// Calls by which this thread has handed work to the driver since it last called
    /// [`Self::reset`]: launches of kernels and of whole graphs, copies, fills.
    pub fn submissions(&self) -> u64 {
        let count = self.symbol::<extern "C" fn() -> u64>(b"cuda_emulator_submissions\0");
        count.map_or(0, |count| count())
    }

    /// Live device allocations and their bytes.
    pub fn live_allocations(&self) -> (usize, u64) {
        type Reader = unsafe extern "C" fn(*mut u64) -> usize;
        let Some(read) = self.symbol::<Reader>(b"cuda_emulator_live_allocations\0") else {
            return (0, 0);
        };
        let mut bytes = 0;
        // SAFETY: the pointer leads to one u64.
        let count = unsafe { read(&mut bytes) };
        (count, bytes)
    }
}
