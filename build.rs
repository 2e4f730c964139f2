//! Compiles `kernels/*.cu` with nvcc and embeds the results; without nvcc the build is CPU-only.
//!
//! nvcc is searched in `NVCC`, `CUDA_HOME/bin`, `PATH`, `nvcc` beside the build's output (where
//! a set-up script may install it) and the Python package `nvidia-cuda-nvcc`. Each file becomes
//! one image that holds code for the architectures in `RESA_CUDA_ARCHS` (default: all released
//! since 2020) and PTX for those that come later; of a file `*_sm90a.cu`, code for 90a alone.

use std::collections::hash_map::DefaultHasher;
use std::ffi::OsString;
use std::fmt::Write;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io, thread};

const ARCHITECTURES: &str = "80,86,89,90a,100a,120";
// --threads=0: code for several architectures is made at a time.
const NVCC_FLAGS: [&str; 5] = ["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--threads=0"];
/// The oldest architecture, whose PTX runs on every newer device.
const OLDEST: &str = "80";
/// Files whose names end so hold instructions of this architecture alone; their PTX runs on no other.
const OF_ONE: (&str, &str) = ("_sm90a", "90a");

type Result<T> = std::result::Result<T, String>;

fn main() {
    if let Err(message) = run() {
        eprintln!("{message}");
        std::process::exit(1);
    }
}

fn run() -> Result<()> {
    for name in ["NVCC", "CUDA_HOME", "PATH", "RESA_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed=build.rs");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let mut images = Vec::new();
    match find_nvcc(&out)? {
        Some(nvcc) => {
            println!("cargo:rerun-if-changed={}", nvcc.display());
            println!("cargo:rustc-env=RESA_NVCC={}", nvcc.display());
            println!(
                "cargo:rustc-env=RESA_BUILT_FOR={}",
                architectures().join(",")
            );
            images = compile_all(&nvcc, &out)?;
        }
        None => println!(
            "cargo:warning=nvcc was not found: this build runs on the CPU only (for CUDA, install \
             the CUDA toolkit 13 and `touch build.rs`, or set NVCC)"
        ),
    }
    let list = image_list(&images)?;
    write(&out.join("kernel_images.rs"), list.as_bytes())
}

/// A Rust expression: the name and contents of every image.
fn image_list(images: &[(String, PathBuf)]) -> Result<String> {
    let mut list = String::from("&[\n");
    for (stem, path) in images {
        let line = writeln!(list, "    ({stem:?}, include_bytes!({path:?})),");
        line.map_err(|e| e.to_string())?;
    }
    list.push_str("]\n");
    Ok(list)
}

fn find_nvcc(out: &Path) -> Result<Option<PathBuf>> {
    if let Some(path) = env::var_os("NVCC").filter(|v| !v.is_empty()) {
        let path = PathBuf::from(path);
        return match path.is_file() {
            true => Ok(Some(path)),
            false => Err(format!("NVCC is {}, which is not a file", path.display())),
        };
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    let found = home.into_iter().chain(on_path).find(|p| p.is_file());
    Ok(found.or_else(|| beside_output(out)).or_else(python_package))
}

/// nvcc in a virtual environment `nvcc` of the target folder.
fn beside_output(out: &Path) -> Option<PathBuf> {
    // <target>/<profile>/build/<package>/out
    let pythons = fs::read_dir(out.ancestors().nth(4)?.join("nvcc/lib")).ok()?;
    pythons
        .flatten()
        .map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"))
        .find(|p| p.is_file())
}

fn python_package() -> Option<PathBuf> {
    const FOLDER: &str = "import importlib.util as u; \
        print(u.find_spec('nvidia.cu13').submodule_search_locations[0])";
    let output = Command::new("python3").args(["-c", FOLDER]).output().ok()?;
    let folder = String::from_utf8(output.stdout).ok()?;
    Some(Path::new(folder.trim()).join("bin/nvcc")).filter(|p| p.is_file())
}

/// Compiles what changed, as many files at a time as Cargo allows; name and image of each file.
fn compile_all(nvcc: &Path, out: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut sources = files_of(Path::new("kernels"), "cu")?;
    sources.sort();
    let mut common = DefaultHasher::new();
    nvcc.hash(&mut common);
    // One that was upgraded in place has the same path.
    let version = Command::new(nvcc).arg("--version").output();
    let version = version.map_err(|e| failed(nvcc, e))?;
    version.stdout.hash(&mut common);
    let mut headers = files_of(Path::new("kernels/common"), "cuh")?;
    headers.sort();
    for header in headers {
        read(&header)?.hash(&mut common);
    }
    let images: Vec<(String, PathBuf)> = sources
        .iter()
        .filter_map(|path| path.file_stem()?.to_str())
        .map(|stem| (stem.to_owned(), out.join(stem).with_extension("fatbin")))
        .collect();
    let jobs: usize = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let queue = Mutex::new(sources.iter().zip(&images));
    let compile_next = || -> Result<()> {
        loop {
            let next = queue.lock().map_err(|e| e.to_string())?.next();
            let Some((source, (_, image))) = next else {
                return Ok(());
            };
            compile(nvcc, &arguments(source), source, image, common.clone())?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1))
            .map(|_| scope.spawn(compile_next))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            let result = worker.join();
            result.map_err(|_| "a thread that ran nvcc panicked".to_owned())?
        })
    })?;
    Ok(images)
}

/// The architectures that the build is for.
fn architectures() -> Vec<String> {
    let chosen = env::var("RESA_CUDA_ARCHS").unwrap_or_else(|_| ARCHITECTURES.to_owned());
    let chosen = chosen.split(',').map(str::trim).filter(|a| !a.is_empty());
    chosen.map(str::to_owned).collect()
}

/// nvcc's options for a file: PTX, and code for the chosen architectures. All code is made from the
/// one PTX: the compiler's front end, which takes most of the time, runs once.
fn arguments(source: &Path) -> Vec<String> {
    let stem = source.file_stem().unwrap_or_default().to_string_lossy();
    let only = stem.ends_with(OF_ONE.0).then_some(OF_ONE.1);
    let chosen = architectures().into_iter();
    let chosen = chosen.filter(|a| only.is_none_or(|only| only == a.as_str()));
    let ptx = only.unwrap_or(OLDEST);
    let code: String = chosen.map(|a| format!(",sm_{a}")).collect();
    let code = format!("-gencode=arch=compute_{ptx},code=[compute_{ptx}{code}]");
    let flags = NVCC_FLAGS.map(str::to_owned).into_iter();
    flags.chain([code]).collect()
}

/// Runs nvcc unless the image was made from the same source, headers and arguments.
fn compile(
    nvcc: &Path,
    arguments: &[String],
    source: &Path,
    image: &Path,
    mut hasher: DefaultHasher,
) -> Result<()> {
    arguments.hash(&mut hasher);
    read(source)?.hash(&mut hasher);
    let stamp = hasher.finish().to_string();
    let stamp_path = image.with_extension("stamp");
    if image.is_file() && fs::read_to_string(&stamp_path).is_ok_and(|old| old == stamp) {
        return Ok(());
    }
    let mut command = Command::new(nvcc);
    command.args(arguments).arg("-o").arg(image).arg(source);
    let output = command.output().map_err(|e| failed(nvcc, e))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: nvcc failed:\n{message}", source.display()));
    }
    write(&stamp_path, stamp.as_bytes())
}

fn files_of(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| failed(folder, e))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let wanted = Some(OsString::from(extension));
    Ok(paths
        .filter(|p| p.extension() == wanted.as_deref())
        .collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| failed(path, e))
}

fn write(path: &Path, contents: &[u8]) -> Result<()> {
    fs::write(path, contents).map_err(|e| failed(path, e))
}

fn failed(path: &Path, error: io::Error) -> String {
    format!("{}: {error}", path.display())
}
