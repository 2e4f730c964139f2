//! What this machine and this build can do, one self-test of every operator on every device, and
//! what to do next.

mod check;
mod operators;

use std::env;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use serde::Serialize;

use crate::bench::ceilings::processor;
use crate::device::simd::{Simd, level, multiplies_bf16};
use crate::device::{CudaDevice, Device, Precision};
use crate::error::{Error, Result};
use crate::train::memory::{available_memory, total_memory};
use operators::OPERATORS;

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Program and version.
    pub program: String,
    /// The host.
    pub cpu: Cpu,
    /// Graphics processors, and what the program needs for them.
    pub cuda: Cuda,
    /// One entry for each operator, device and precision.
    pub tests: Vec<Test>,
    /// What to do next, most urgent first.
    pub next: Vec<String>,
}

/// The host.
#[derive(Clone, Debug, Serialize)]
pub struct Cpu {
    /// What the processor calls itself.
    pub name: Option<String>,
    /// Threads that share work.
    pub threads: usize,
    /// The widest instruction set that is used: `avx512`, `avx2` or `baseline`.
    pub simd: &'static str,
    /// Whether it multiplies bf16 values itself (AVX512_BF16).
    pub avx512_bf16: bool,
    /// Memory of the machine in bytes.
    pub memory: Option<u64>,
    /// Memory in bytes that is not in use.
    pub available_memory: Option<u64>,
}

/// What there is of CUDA.
#[derive(Clone, Debug, Serialize)]
pub struct Cuda {
    /// Compute capabilities that the kernels of this build are compiled for, beside PTX; `None`
    /// in a build without kernels.
    pub built_for: Option<Vec<&'static str>>,
    /// The newest CUDA version that the installed driver runs; `None` without a driver.
    pub driver: Option<String>,
    /// nvcc on this machine, which a build with kernels needs.
    pub nvcc: Option<Nvcc>,
    /// The driver's devices.
    pub devices: Vec<Gpu>,
    /// Why there are none to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A compiler of CUDA.
#[derive(Clone, Debug, Serialize)]
pub struct Nvcc {
    /// Where it is.
    pub path: PathBuf,
    /// Its release, such as `13.0`, where it says so.
    pub release: Option<String>,
}

/// A CUDA device.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Its number.
    pub ordinal: usize,
    /// What it calls itself.
    pub name: String,
    /// Such as `9.0`.
    pub compute_capability: String,
    /// Its memory in bytes.
    pub memory: usize,
}

/// How far an operator is from a computation in float64.
#[derive(Clone, Debug, Serialize)]
pub struct Test {
    /// The operator's stem.
    pub operator: &'static str,
    /// `cpu` or `cuda:N`.
    pub device: String,
    /// `f32` or `bf16`.
    pub precision: &'static str,
    /// Largest relative error of output and gradients; `None` where it did not run or a result is
    /// not finite.
    pub error: Option<f64>,
    /// The largest that passes.
    pub limit: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why it did not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// How a self-test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Within the limit.
    Passed,
    /// Beyond it, or an error.
    Failed,
    /// The operator has no version for the device.
    NoKernel,
}

/// Looks at the machine and runs all self-tests: seconds on a CPU or GPU, `threads` as in
/// [`Device::cpu`].
///
/// # Errors
/// When the CPU's threads cannot be started. What is wrong with a GPU is part of the report.
pub fn examine(threads: usize) -> Result<Report> {
    let cpu = Device::cpu(threads)?;
    let mut tests = Vec::new();
    for precision in [Precision::F32, Precision::Bf16] {
        tests.extend(self_tests(&cpu.clone().with_precision(precision), "cpu"));
    }
    let mut cuda = Cuda {
        built_for: CudaDevice::built_for(),
        driver: CudaDevice::driver_version().map(|(major, minor)| format!("{major}.{minor}")),
        nvcc: nvcc(),
        devices: Vec::new(),
        problem: None,
    };
    if cuda.built_for.is_some() && cuda.driver.is_some() {
        let count = CudaDevice::count();
        for ordinal in 0..*count.as_ref().unwrap_or(&0) {
            match open(ordinal, threads) {
                Ok((device, gpu)) => {
                    tests.extend(self_tests(&device, &format!("cuda:{ordinal}")));
                    cuda.devices.push(gpu);
                }
                Err(error) => cuda.problem = Some(error.to_string()),
            }
        }
        if let Err(error) = count {
            cuda.problem = Some(error.to_string());
        }
    }
    let cpu = Cpu {
        name: processor(),
        threads: cpu.threads(),
        simd: match level() {
            Simd::Avx512 => "avx512",
            Simd::Avx2 => "avx2",
            Simd::Baseline => "baseline",
        },
        avx512_bf16: multiplies_bf16(),
        memory: total_memory(),
        available_memory: available_memory(),
    };
    Ok(Report {
        program: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned(),
        next: advice(&cpu, &cuda, &tests),
        cpu,
        cuda,
        tests,
    })
}

fn open(ordinal: usize, threads: usize) -> Result<(Device, Gpu)> {
    let cuda = CudaDevice::new(ordinal, threads)?;
    let (major, minor) = cuda.compute_capability()?;
    let gpu = Gpu {
        ordinal,
        name: cuda.name()?,
        compute_capability: format!("{major}.{minor}"),
        memory: cuda.total_memory()?,
    };
    Ok((Device::Cuda(cuda), gpu))
}

/// Rounding is all that may separate a result from float64: that of f32 sums, or of the few
/// roundings to bf16 (each of 2^-9) between an operator's input and its output.
fn limit(precision: Precision) -> f64 {
    match precision {
        Precision::F32 => 2e-5,
        Precision::Bf16 => 0.02,
    }
}

fn self_tests(device: &Device, name: &str) -> Vec<Test> {
    let precision = device.precision();
    let test = |&(operator, run): &(&'static str, operators::SelfTest)| {
        let result = run(device);
        let limit = limit(precision);
        let outcome = match &result {
            Ok(error) if *error <= limit => Outcome::Passed,
            Err(Error::NoKernel { .. }) => Outcome::NoKernel,
            _ => Outcome::Failed,
        };
        Test {
            operator,
            device: name.to_owned(),
            precision: precision.name(),
            error: result.as_ref().ok().copied().filter(|e| e.is_finite()),
            limit,
            outcome,
            problem: result.err().map(|e| e.to_string()),
        }
    };
    OPERATORS.iter().map(test).collect()
}

/// Where a build would find nvcc, as build.rs looks for it.
fn nvcc() -> Option<Nvcc> {
    let given = env::var_os("NVCC").filter(|v| !v.is_empty());
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    let places = given.map(PathBuf::from).into_iter().chain(home);
    let path = places.chain(on_path).find(|path| path.is_file())?;
    let said = Command::new(&path).arg("--version").output().ok();
    let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let release = said.and_then(|text| {
        let (_, rest) = text.split_once("release ")?;
        Some(rest.split([',', '\n']).next()?.to_owned())
    });
    Some(Nvcc { path, release })
}

/// Memory in bytes under which training SmolLM2-135M, the smallest real model, gets tight.
const SMALL_MEMORY: u64 = 4 << 30;

fn advice(cpu: &Cpu, cuda: &Cuda, tests: &[Test]) -> Vec<String> {
    let mut next = Vec::new();
    let mut say = |text: &str| next.push(text.to_owned());
    for test in tests.iter().filter(|t| t.outcome == Outcome::Failed) {
        let Test {
            operator, device, ..
        } = test;
        say(&format!(
            "{operator} gives wrong results on {device}, or none: do not train there, and report it with \
             the output of `resa-engine doctor --json`."
        ));
    }
    match (&cuda.built_for, &cuda.driver) {
        (None, None) => say(
            "Everything runs on the CPU: this build has no CUDA kernels and the \
             machine no NVIDIA driver.",
        ),
        (None, Some(_)) => say(match cuda.nvcc {
            Some(_) => {
                "There is a driver and an nvcc, but this build has no CUDA kernels: build again \
                 with `touch build.rs && cargo build --release`."
            }
            None => {
                "There is a driver, but this build has no CUDA kernels: install the CUDA toolkit \
                 13 (or set NVCC to its nvcc) and build again with `touch build.rs && cargo build \
                 --release`."
            }
        }),
        (Some(_), None) => say(
            "Everything runs on the CPU: the machine has no NVIDIA driver \
             (libcuda). For a GPU, install NVIDIA's driver for CUDA 13.",
        ),
        (Some(_), Some(_)) => match (cuda.devices.first(), &cuda.problem) {
            (Some(gpu), _) => say(&format!(
                "Give `--device cuda:{}` to train on {}; without it the CPU is used.",
                gpu.ordinal, gpu.name
            )),
            (None, Some(problem)) => say(&format!("No GPU can be used: {problem}.")),
            (None, None) => say("The driver has no device: everything runs on the CPU."),
        },
    }
    if cpu
        .available_memory
        .is_some_and(|bytes| bytes < SMALL_MEMORY)
    {
        say("Less than 4 GiB of memory are free: lower --sae-batch, --seq-len and --latents.");
    }
    if cpu.avx512_bf16 {
        say("This CPU multiplies bf16 values itself: `--dtype bf16` is the faster there.");
    }
    say("`resa-engine train` runs both stages on an embedded example in seconds.");
    say(
        "`resa-engine train --target MODEL --data FILE --dry-run` says what a run of your own will \
         take.",
    );
    next
}

impl Report {
    /// Whether no self-test failed.
    pub fn is_sound(&self) -> bool {
        self.tests.iter().all(|t| t.outcome != Outcome::Failed)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, text: &str| writeln!(f, "{name:<18}{text}");
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
        let or_unknown = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), gib);
        let Self { cpu, cuda, .. } = self;
        row("program", &self.program)?;
        row("processor", cpu.name.as_deref().unwrap_or("unknown"))?;
        row("threads", &cpu.threads.to_string())?;
        let bf16 = match cpu.avx512_bf16 {
            true => "bf16 products in hardware",
            false => "no bf16 products in hardware",
        };
        row("instructions", &format!("{}, {bf16}", cpu.simd))?;
        let (all, free) = (or_unknown(cpu.memory), or_unknown(cpu.available_memory));
        row("memory", &format!("{all}, {free} available"))?;
        let kernels = match &cuda.built_for {
            None => "none: this build is for the CPU alone".to_owned(),
            Some(list) if list.is_empty() => "PTX alone".to_owned(),
            Some(list) => format!("for sm_{}, and PTX", list.join(", sm_")),
        };
        row("CUDA kernels", &kernels)?;
        row(
            "CUDA driver",
            &cuda.driver.as_ref().map_or_else(
                || "none (libcuda is not installed)".to_owned(),
                |version| format!("runs CUDA up to {version}"),
            ),
        )?;
        let nvcc = cuda.nvcc.as_ref().map_or_else(
            || "not found (only a build with kernels needs it)".to_owned(),
            |nvcc| {
                let release = nvcc.release.as_deref().unwrap_or("unknown release");
                format!("{release}, {}", nvcc.path.display())
            },
        );
        row("nvcc", &nvcc)?;
        for gpu in &cuda.devices {
            row(
                &format!("cuda:{}", gpu.ordinal),
                &format!(
                    "{}, compute capability {}, {}",
                    gpu.name,
                    gpu.compute_capability,
                    gib(gpu.memory as u64)
                ),
            )?;
        }
        if let Some(problem) = &cuda.problem {
            row("problem", problem)?;
        }
        self.write_tests(f)?;
        writeln!(f, "\nNext")?;
        self.next
            .iter()
            .try_for_each(|text| writeln!(f, "  {text}"))
    }
}

impl Report {
    /// A line for each operator, a column for each device and precision.
    fn write_tests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut columns: Vec<(&str, &str)> = Vec::new();
        for test in &self.tests {
            let column = (test.device.as_str(), test.precision);
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        write!(f, "\n{:<18}", "self-test")?;
        for (device, precision) in &columns {
            write!(f, "{:>16}", format!("{device} {precision}"))?;
        }
        writeln!(f)?;
        for (operator, _) in OPERATORS {
            write!(f, "{operator:<18}")?;
            let of_operator = self.tests.iter().filter(|t| t.operator == operator);
            for test in of_operator {
                let text = match (test.outcome, test.error) {
                    (Outcome::Passed, Some(error)) => format!("ok {error:.0e}"),
                    (Outcome::Failed, Some(error)) => format!("WRONG {error:.0e}"),
                    (Outcome::NoKernel, _) => "no kernel".to_owned(),
                    _ => "FAILED".to_owned(),
                };
                write!(f, "{text:>16}")?;
            }
            writeln!(f)?;
        }
        for test in &self.tests {
            if let (Outcome::Failed, Some(problem)) = (test.outcome, &test.problem) {
                writeln!(f, "{} on {}: {problem}", test.operator, test.device)?;
            }
        }
        Ok(())
    }
}
