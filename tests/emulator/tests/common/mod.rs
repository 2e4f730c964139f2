//! What the tests share: a context on the driver in use, modules from PTX or CUDA C++, and
//! kernels launched with buffers.

// Every test binary uses a part of this.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use cuda_emulator::{Backend, Counters, Emulator, emulator, install};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, LaunchConfig, sys};
use cudarc::nvrtc::Ptx;

/// A context on the GPU or the emulator.
pub fn context() -> Arc<CudaContext> {
    install().expect("a CUDA driver");
    CudaContext::new(0).expect("a CUDA context")
}

/// Whether the tests run on the emulator; counters and findings exist only there.
pub fn emulated() -> bool {
    install().expect("a CUDA driver") == Backend::Emulator
}

pub fn emu() -> &'static Emulator {
    emulator().expect("the emulator")
}

/// Loads PTX text.
pub fn module(context: &Arc<CudaContext>, ptx: &str) -> Arc<CudaModule> {
    context.load_module(Ptx::from_src(ptx)).unwrap_or_else(|e| panic!("{e:?}: {}", emu().last_finding()))
}

pub fn function(module: &Arc<CudaModule>, name: &str) -> CudaFunction {
    module.load_function(name).unwrap_or_else(|e| panic!("{name}: {e:?}"))
}

pub fn config(grid: u32, block: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 }
}

/// Counters of this thread's last launch.
pub fn counters() -> Counters {
    emu().last_counters().expect("a launch")
}

/// The text of the finding that made a launch fail.
pub fn finding<T>(result: Result<T, DriverError>, code: sys::CUresult) -> String {
    match result {
        Ok(_) => panic!("the launch ended without a finding"),
        Err(error) => assert_eq!(error.0, code, "{}", emu().last_finding()),
    }
    emu().last_finding()
}

/// nvcc from `NVCC`, `CUDA_HOME`, `PATH`, what setup_nvcc.sh installed, or the Python package.
fn nvcc() -> PathBuf {
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let home = std::env::var_os("CUDA_HOME").map(|h| PathBuf::from(h).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|p| p.join("nvcc"));
    let target = std::env::current_exe().ok().and_then(|e| Some(e.ancestors().nth(3)?.join("nvcc/lib")));
    let installed = target.into_iter().flat_map(|lib| {
        std::fs::read_dir(lib).into_iter().flatten().flatten().map(|python| {
            python.path().join("site-packages/nvidia/cu13/bin/nvcc")
        })
    });
    let found = named.into_iter().chain(home).chain(on_path).chain(installed).find(|p| p.is_file());
    found.or_else(python_package).expect(
        "nvcc was not found. Install it with tests/emulator/setup_nvcc.sh, or install the CUDA toolkit 13 and set NVCC",
    )
}

fn python_package() -> Option<PathBuf> {
    let code = "import importlib.util as u; print(u.find_spec('nvidia.cu13').submodule_search_locations[0])";
    let output = Command::new("python3").args(["-c", code]).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    Some(PathBuf::from(folder.trim()).join("bin/nvcc")).filter(|p| p.is_file())
}

/// Runs nvcc on `tests/kernels/<name>.cu`; `output` is the kind of file (`ptx`, `fatbin`, `cubin`).
pub fn nvcc_compile(name: &str, output: &str, arguments: &[&str]) -> Vec<u8> {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/kernels/{name}.cu"));
    let unique = format!("{name}-{}-{:?}", std::process::id(), std::thread::current().id());
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{unique}.{output}"));
    let run = Command::new(nvcc())
        .args(["-O3", "-std=c++17", "-lineinfo", &format!("-{output}"), "-o"])
        .arg(&target)
        .arg(&source)
        .args(arguments)
        .output()
        .expect("nvcc starts");
    assert!(run.status.success(), "nvcc: {}", String::from_utf8_lossy(&run.stderr));
    let bytes = std::fs::read(&target).expect("nvcc's output");
    std::fs::remove_file(&target).expect("nvcc's output can be removed");
    bytes
}

/// PTX of `tests/kernels/<name>.cu` for an architecture such as `compute_80`.
pub fn compile(name: &str, architecture: &str) -> String {
    let bytes = nvcc_compile(name, "ptx", &[&format!("-arch={architecture}")]);
    String::from_utf8(bytes).expect("PTX is text")
}

/// A module from `tests/kernels/<name>.cu`.
pub fn compiled(context: &Arc<CudaContext>, name: &str) -> Arc<CudaModule> {
    module(context, &compile(name, "compute_80"))
}

/// Deterministic values in [-1, 1).
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}
