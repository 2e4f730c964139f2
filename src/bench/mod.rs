//! `bench-kernels`: how fast every operator is at the shapes of three models, beside what the
//! machine can do at most; whole stages; the count of their FLOP.

mod build;
pub mod cases;
pub mod ceilings;
mod clock;
pub mod compare;
pub mod cost_model;
mod data;
pub mod gpu;
pub mod report;
mod runs;
pub mod shapes;
pub mod stages;
pub mod stats;
pub mod work;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::device::{Device, Precision};
use crate::error::{Error, Result};
use crate::train::memory::available_memory;
use crate::train::{DeviceSetting, Event, Observer};

use cases::{Case, Setup};
use ceilings::Ceilings;
use compare::OldResults;
use cost_model::CostModel;
use data::Data;
use gpu::{Emulator, Gpu};
use report::{DeviceInfo, Report, Roof, Row};
use shapes::ModelShape;
use stats::Times;
use work::Limits;

/// Registers, shared memory, spills and instructions of every kernel, as nvcc compiled them.
pub const STATIC: &str = include_str!("../../kernels/static.txt");

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where.
    pub device: DeviceSetting,
    /// Host threads; 0 is one for each core.
    pub threads: usize,
    /// Rows whose name holds one of these; all where empty.
    pub filter: Vec<String>,
    /// Models whose shapes are measured; all where empty.
    pub models: Vec<String>,
    /// Time for the repetitions of a row.
    pub budget: Duration,
    /// Earlier results to compare with.
    pub compare: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: DeviceSetting::Cpu,
            threads: 0,
            filter: Vec::new(),
            models: Vec::new(),
            budget: Duration::from_millis(200),
            compare: None,
        }
    }
}

/// Name of the rows of whole stages in a filter.
const STAGES: &str = "stages";

/// What the CPU is asked for: about a second at its f32 rate.
const CPU: Setup = Setup {
    activation: 4,
    precisions: &[Precision::F32, Precision::Bf16],
    limits: Limits {
        flop: 2e11,
        bytes: 1e9,
    },
};
/// A GPU takes every size as it is.
const GPU: Setup = Setup {
    activation: 2,
    precisions: &[Precision::Bf16],
    limits: Limits {
        flop: f64::INFINITY,
        bytes: f64::INFINITY,
    },
};
/// The emulator executes about a GFLOP a second.
const EMULATOR: Setup = Setup {
    limits: Limits {
        flop: 1e8,
        bytes: 8e6,
    },
    ..GPU
};

/// Measures. `observer` hears how far it has come.
///
/// # Errors
/// A filter or model that names nothing, a device that cannot be used, earlier results that
/// cannot be read.
pub fn run(options: &Options, observer: &mut dyn Observer) -> Result<Report> {
    let old = options
        .compare
        .as_deref()
        .map(OldResults::read)
        .transpose()?;
    let models = chosen_models(options)?;
    let device = open(options)?;
    let mut bench = Bench::new(&device, options)?;
    let cases: Vec<Case> = models
        .iter()
        .flat_map(|model| cases::cases(model, &bench.setup))
        .filter(|case| is_wanted(&options.filter, &case.name()))
        .collect();
    let staged: Vec<&ModelShape> = models
        .iter()
        .filter(|model| {
            bench.emulator.is_none()
                && is_wanted(&options.filter, &format!("{STAGES} {}", model.name))
        })
        .collect();
    if cases.is_empty() && staged.is_empty() {
        return Err(Error::setting(
            "--filter",
            format!(
                "no row's name holds {:?}; a name is an operator, a pass and a model, such as \
                 \"gemm forward smollm2 q_proj f32\", or \"{STAGES} smollm2\"",
                options.filter.join(", ")
            ),
        ));
    }
    let rounds = bench.rounds();
    let steps = (rounds * cases.len() + staged.len()) as u64;
    let name = "Kernels".to_owned();
    observer.on_event(&Event::Phase {
        name,
        steps,
        done: 0,
    });
    let mut done = 0;
    let mut advance = || {
        done += 1;
        observer.on_event(&Event::Progress { done });
    };
    for case in std::iter::repeat_n(&cases, rounds).flatten() {
        bench.measure(case)?;
        advance();
    }
    for model in staged {
        bench.stages(model, options)?;
        advance();
    }
    let mut report = bench.report;
    if let Some(old) = old {
        old.judge(&mut report);
    }
    Ok(report)
}

fn is_wanted(filter: &[String], name: &str) -> bool {
    let holds = |words: &String| words.split_whitespace().all(|word| name.contains(word));
    filter.is_empty() || filter.iter().any(holds)
}

fn chosen_models(options: &Options) -> Result<Vec<ModelShape>> {
    if let Some(unknown) = options
        .models
        .iter()
        .find(|m| !shapes::NAMES.contains(&m.as_str()))
    {
        return Err(Error::setting(
            "--model",
            format!(
                "expected one of {}, found {unknown:?}",
                shapes::NAMES.join(", ")
            ),
        ));
    }
    let models = shapes::models().into_iter();
    let is_chosen =
        |m: &ModelShape| options.models.is_empty() || options.models.iter().any(|n| n == m.name);
    Ok(models.filter(is_chosen).collect())
}

fn open(options: &Options) -> Result<Device> {
    match options.device {
        DeviceSetting::Auto | DeviceSetting::Cpu => Device::cpu(options.threads),
        DeviceSetting::Cuda(ordinal) => Device::cuda(ordinal, options.threads)
            .map_err(|e| Error::setting("--device", e.to_string())),
    }
}

/// A device that is being measured.
struct Bench<'a> {
    device: &'a Device,
    setup: Setup,
    budget: Duration,
    data: Data<'a>,
    emulator: Option<Emulator>,
    gpu: Option<Gpu>,
    /// What each row took on the host, in all rounds so far.
    seconds: HashMap<String, Vec<f64>>,
    report: Report,
}

impl<'a> Bench<'a> {
    fn new(device: &'a Device, options: &Options) -> Result<Self> {
        let mut notes = Vec::new();
        let (mut emulator, mut gpu, mut ceilings) = (None, None, None);
        let (kind, name, cache_bytes, setup);
        match device {
            Device::Cpu(_) => {
                (kind, setup) = ("cpu", CPU);
                name = ceilings::processor().unwrap_or_else(|| "unknown".to_owned());
                cache_bytes = ceilings::last_level_cache();
                ceilings = Some(Ceilings::measure(device, cache_bytes));
                notes.push(
                    "Rates count the least FLOP and bytes; rows that a cache serves may pass the \
                     ceiling of memory."
                        .to_owned(),
                );
            }
            Device::Cuda(cuda) => {
                name = cuda.name()?;
                cache_bytes = gpu::cache_bytes(cuda);
                emulator = Emulator::loaded();
                if emulator.is_some() {
                    (kind, setup) = ("emulator", EMULATOR);
                    notes.push(format!(
                        "These are counters of an emulator, not times; {}.",
                        gpu::SOURCE
                    ));
                } else {
                    (kind, setup) = ("cuda", GPU);
                    gpu = Some(Gpu::new(cuda, &name, options.budget)?);
                }
            }
        }
        Ok(Self {
            device,
            setup,
            budget: options.budget,
            data: Data::new(device),
            seconds: HashMap::new(),
            emulator,
            report: Report {
                program: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned(),
                device: DeviceInfo {
                    kind,
                    name,
                    threads: device.threads(),
                    cache_bytes,
                },
                ceilings,
                gpu_ceilings: gpu.as_ref().map(|gpu| gpu.ceilings.clone()),
                rows: Vec::new(),
                without_kernel: Vec::new(),
                stages: Vec::new(),
                cost_model: CostModel::count()?,
                notes,
            },
            gpu,
        })
    }

    /// How often all rows are measured: events and counters do not wander as the host's clock.
    fn rounds(&self) -> usize {
        match self.device {
            Device::Cpu(_) => clock::ROUNDS,
            Device::Cuda(_) => 1,
        }
    }

    /// Measures a row, once more where it has been; an operator without a kernel is noted as such.
    fn measure(&mut self, case: &Case) -> Result<()> {
        let least = case.work.least(case.pass, self.setup.bytes(case.precision));
        let mut row = Row {
            name: case.name(),
            operator: case.work.operator(),
            pass: case.pass,
            model: case.model,
            shape: case.work.to_string(),
            reduced_from: case.reduced_from(),
            flop: least.flop,
            bytes: least.bytes,
            seconds: None,
            seconds_warm: None,
            flop_per_s: None,
            bytes_per_s: None,
            roof: None,
            peer: None,
            counters: None,
            estimates: Vec::new(),
            verdict: None,
            ratio_to_old: None,
        };
        match self.fill(case, &mut row) {
            Ok(()) => {
                let rows = &mut self.report.rows;
                match rows.iter_mut().find(|old| old.name == row.name) {
                    Some(old) => *old = row,
                    None => rows.push(row),
                }
            }
            Err(Error::NoKernel { .. }) => {
                let without = &mut self.report.without_kernel;
                if !without.iter().any(|op| op == row.operator) {
                    without.push(row.operator.to_owned());
                }
            }
            Err(error) => return Err(error),
        }
        self.device.release_memory();
        Ok(())
    }

    fn fill(&mut self, case: &Case, row: &mut Row) -> Result<()> {
        self.data.set_weight(case.precision);
        let sets = match self.device {
            Device::Cpu(_) => sets(self.report.device.cache_bytes, row.bytes),
            // The L2 cache is flushed instead.
            Device::Cuda(_) => 1,
        };
        let mut run = build::build(case.work, case.pass, &mut self.data, sets)?;
        let device = &self.device.clone().with_precision(case.precision);
        let budget = self.budget;
        if let Some(emulator) = self.emulator {
            return device.run(|| gpu::count(emulator, device, run.as_mut(), row));
        }
        if let Some(gpu) = &mut self.gpu {
            return gpu.measure(run.as_mut(), case.work, row);
        }
        let taken = device.run(|| clock::host_seconds(device, run.as_mut(), budget, sets))?;
        let seconds = self.seconds.entry(row.name.clone()).or_default();
        seconds.extend(taken);
        let Some(times) = Times::of(seconds.clone()) else {
            return Ok(());
        };
        row.set_times(times);
        if let Some(ceilings) = &self.report.ceilings {
            let flop_per_s = ceilings.flop_per_s(case.precision);
            let bytes_per_s = ceilings.copy_bytes_per_s;
            row.roof = Some(Roof::of(
                row.flop,
                row.bytes,
                times.median,
                flop_per_s,
                bytes_per_s,
            ));
        }
        Ok(())
    }

    /// Measures whole stages, where the machine has the memory and the device can train.
    fn stages(&mut self, model: &ModelShape, options: &Options) -> Result<()> {
        // Weights on disk and in f32, SAE, gradients and optimizer: 135M take under 3 GB.
        const MOST_WIDTH: usize = 1024;
        const MEMORY: u64 = 4 << 30;
        let name = model.name;
        if model.config.hidden_size > MOST_WIDTH {
            let note = format!("Stages of {name} are not measured here: a step takes minutes.");
            self.report.notes.push(note);
            return Ok(());
        }
        if available_memory().is_some_and(|bytes| bytes < MEMORY) {
            let note = format!("Stages of {name} are not measured: less than 4 GiB are free.");
            self.report.notes.push(note);
            return Ok(());
        }
        match stages::measure(model, options.device, options.threads) {
            Ok(mut rates) => {
                if let Some(ceilings) = &self.report.ceilings {
                    let ceiling = ceilings.flop_per_s(Precision::fastest());
                    for rate in &mut rates {
                        rate.fraction = Some(rate.flop_per_s / ceiling);
                    }
                }
                self.report.stages.extend(rates);
            }
            Err(error @ (Error::Setting { .. } | Error::NoKernel { .. })) => {
                let note = format!("Stages of {name} are not measured: {error}");
                self.report.notes.push(note);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Sets of operands that together are twice the cache.
fn sets(cache_bytes: usize, bytes: f64) -> usize {
    const MOST: usize = 256;
    let sets = (2.0 * cache_bytes as f64 / bytes.max(1.0)).ceil();
    (sets as usize).clamp(1, MOST)
}
