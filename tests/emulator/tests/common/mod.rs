//! What the tests share: a context on the driver in use, modules from PTX or CUDA C++, and
//! kernels launched with buffers.

// Every test binary uses a part of this.
#![allow(dead_code)]

pub mod clusters;
pub mod hopper;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use cuda_emulator::{Backend, Counters, Emulator, emulator, install};
use cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DriverError, LaunchConfig, PushKernelArg, sys,
};
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
    context
        .load_module(Ptx::from_src(ptx))
        .unwrap_or_else(|e| panic!("{e:?}: {}", emu().last_finding()))
}

pub fn function(module: &Arc<CudaModule>, name: &str) -> CudaFunction {
    module
        .load_function(name)
        .unwrap_or_else(|e| panic!("{name}: {e:?}"))
}

pub fn config(grid: u32, block: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (grid, 1, 1),
        block_dim: (block, 1, 1),
        shared_mem_bytes: 0,
    }
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
    let target = std::env::current_exe()
        .ok()
        .and_then(|e| Some(e.ancestors().nth(3)?.join("nvcc/lib")));
    let installed = target.into_iter().flat_map(|lib| {
        std::fs::read_dir(lib)
            .into_iter()
            .flatten()
            .flatten()
            .map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"))
    });
    let found = named
        .into_iter()
        .chain(home)
        .chain(on_path)
        .chain(installed)
        .find(|p| p.is_file());
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
    let unique = format!(
        "{name}-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{unique}.{output}"));
    let run = Command::new(nvcc())
        .args([
            "-O3",
            "-std=c++17",
            "-lineinfo",
            &format!("-{output}"),
            "-o",
        ])
        .arg(&target)
        .arg(&source)
        .args(arguments)
        .output()
        .expect("nvcc starts");
    assert!(
        run.status.success(),
        "nvcc: {}",
        String::from_utf8_lossy(&run.stderr)
    );
    let bytes = std::fs::read(&target).expect("nvcc's output");
    std::fs::remove_file(&target).expect("nvcc's output can be removed");
    bytes
}

/// PTX of `tests/kernels/<name>.cu` for an architecture such as `compute_80`; compiled once per
/// state of the kernels, whatever the number of test processes.
pub fn compile(name: &str, architecture: &str) -> String {
    static CACHE: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    let compiled = cache
        .entry(format!("{name} {architecture}"))
        .or_insert_with(|| compile_to_file(name, architecture));
    compiled.clone()
}

fn compile_to_file(name: &str, architecture: &str) -> String {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
    let mut sources: Vec<PathBuf> = std::fs::read_dir(folder)
        .expect("the kernels' folder")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| {
            path.extension().is_some_and(|e| e == "cuh")
                || path.file_stem().is_some_and(|s| s == name)
        })
        .collect();
    sources.sort();
    let mut hasher = DefaultHasher::new();
    nvcc().hash(&mut hasher);
    for path in sources {
        std::fs::read(path)
            .expect("a kernel's source")
            .hash(&mut hasher);
    }
    let file = format!("{name}-{architecture}-{:016x}.ptx", hasher.finish());
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(file);
    if let Ok(text) = std::fs::read_to_string(&path) {
        return text;
    }
    let bytes = nvcc_compile(name, "ptx", &[&format!("-arch={architecture}")]);
    let unfinished = path.with_extension(format!("{}", std::process::id()));
    std::fs::write(&unfinished, &bytes).expect("PTX can be written");
    std::fs::rename(&unfinished, &path).expect("PTX can be renamed");
    String::from_utf8(bytes).expect("PTX is text")
}

/// A module from `tests/kernels/<name>.cu`.
pub fn compiled(context: &Arc<CudaContext>, name: &str) -> Arc<CudaModule> {
    module(context, &compile(name, "compute_80"))
}

/// Environment variable that makes [`digest`] print.
pub const DIGESTS: &str = "CUDA_EMULATOR_TEST_DIGESTS";

/// Prints a digest of a result's bits, for comparison between runs under different schedules.
pub fn digest<T: Hash>(what: &str, values: &[T]) {
    if std::env::var_os(DIGESTS).is_some() {
        let mut hasher = DefaultHasher::new();
        values.hash(&mut hasher);
        println!("digest {what} {:016x}", hasher.finish());
    }
}

/// Digests that tests of this executable print under a schedule, `None` for the fixed one.
pub fn digests_under(schedule: Option<u64>, tests: &[&str]) -> Vec<String> {
    let mut command = Command::new(std::env::current_exe().expect("the test's path"));
    command
        .args(["--exact", "--nocapture", "--test-threads=1"])
        .args(tests);
    command.env(DIGESTS, "1").env_remove("CUDA_EMU_SCHEDULE");
    if let Some(seed) = schedule {
        command.env("CUDA_EMU_SCHEDULE", seed.to_string());
    }
    let output = command.output().expect("the test starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{schedule:?}: {text}");
    let mut lines: Vec<String> = text
        .lines()
        .filter_map(|line| Some(line[line.find("digest ")?..].to_string()))
        .collect();
    lines.sort();
    lines
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

/// Runs hand-written PTX once per element: `body` finds three 64-bit inputs in `%a`, `%b` and
/// `%c`, and leaves its result in `%o` (all `.b64`). The other registers it declares itself.
pub fn evaluate(body: &str, inputs: &[[u64; 3]]) -> Vec<u64> {
    let ptx = format!(
        ".version 8.0
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 input, .param .u64 output, .param .u32 count)
{{
    .reg .b64 %a, %b, %c, %o, %in, %out;
    .reg .b32 %i, %n, %t, %lo, %hi;
    .reg .pred %done;
    ld.param.u64 %in, [input];
    ld.param.u64 %out, [output];
    ld.param.u32 %n, [count];
    mov.u32 %i, %ctaid.x;
    mov.u32 %t, %ntid.x;
    mov.u32 %lo, %tid.x;
    mad.lo.s32 %i, %i, %t, %lo;
    setp.ge.u32 %done, %i, %n;
    @%done ret;
    mad.wide.u32 %in, %i, 24, %in;
    mad.wide.u32 %out, %i, 8, %out;
    ld.global.b64 %a, [%in];
    ld.global.b64 %b, [%in+8];
    ld.global.b64 %c, [%in+16];
    mov.b64 %o, 0;
    {{
{body}
    }}
    st.global.b64 [%out], %o;
    ret;
}}
"
    );
    let context = context();
    let stream = context.default_stream();
    let kernel = function(&module(&context, &ptx), "probe");
    let flat: Vec<u64> = inputs.iter().flatten().copied().collect();
    let input = stream.clone_htod(&flat).expect("a copy to the device");
    let mut output = stream
        .alloc_zeros::<u64>(inputs.len())
        .expect("device memory");
    let count = inputs.len() as u32;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&input).arg(&mut output).arg(&count);
    // SAFETY: the arguments match the kernel's parameters.
    let result = unsafe { launch.launch(config(count.div_ceil(256), 256)) };
    result.unwrap_or_else(|e| panic!("{e:?}: {}", emu().last_finding()));
    stream.clone_dtoh(&output).expect("a copy from the device")
}

/// [`evaluate`] with 32-bit values: `body` uses `%x`, `%y`, `%z` and leaves `%r` (all `.b32`).
pub fn evaluate32(body: &str, inputs: &[[u32; 3]]) -> Vec<u32> {
    let wide: Vec<[u64; 3]> = inputs.iter().map(|i| i.map(u64::from)).collect();
    let body = format!(
        "    .reg .b32 %x, %y, %z, %r;
    cvt.u32.u64 %x, %a;
    cvt.u32.u64 %y, %b;
    cvt.u32.u64 %z, %c;
{body}
    cvt.u64.u32 %o, %r;"
    );
    evaluate(&body, &wide)
        .into_iter()
        .map(|v| v as u32)
        .collect()
}

/// The finding names kernel, block, thread, PTX line and a line of `file` that is marked with
/// `// FAULT` and, among others, `tag`.
pub fn assert_place(text: &str, (file, source): (&str, &str), kernel: &str, tag: &str) {
    for part in [
        &format!("in kernel {kernel}, block ("),
        "thread (",
        "at PTX line ",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let is_marked = |line: &str| {
        let marks = line.split_once("// FAULT ").map_or("", |(_, marks)| marks);
        marks.split(' ').any(|mark| mark == tag)
    };
    let lines: Vec<usize> = source
        .lines()
        .enumerate()
        .filter(|(_, line)| is_marked(line))
        .map(|(i, _)| i + 1)
        .collect();
    assert!(!lines.is_empty(), "no line of {file} is marked {tag}");
    let mut words = text.split([' ', ',', '\n', '(', ')']);
    let found = words.any(|word| {
        let line = word.rsplit_once(&format!("{file}:"));
        line.is_some_and(|(_, line)| line.parse().is_ok_and(|n: usize| lines.contains(&n)))
    });
    assert!(found, "expected {file}:{lines:?}: {text}");
}
