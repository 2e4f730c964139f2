//! What was measured: for programs as JSON, for people as tables.

use std::fmt;

use serde::Serialize;

use super::ceilings::Ceilings;
use super::cost_model::CostModel;
use super::gpu::{Counted, Estimate, GpuCeilings};
use super::stages::StageRate;
use super::stats::{Times, Verdict};
use super::work::Pass;

/// The results of a run of `bench-kernels`.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Name and version of the program.
    pub program: String,
    /// What ran.
    pub device: DeviceInfo,
    /// What the host's cores can do at most, where they were measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ceilings: Option<Ceilings>,
    /// What the GPU can do at most, where one was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu_ceilings: Option<GpuCeilings>,
    /// One for each operator, pass, model and type of weights.
    pub rows: Vec<Row>,
    /// Operators that the device has no kernel for yet.
    pub without_kernel: Vec<String>,
    /// Tokens a second of the two stages.
    pub stages: Vec<StageRate>,
    /// FLOP a token beside the published cost model's.
    pub cost_model: CostModel,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// What operators ran on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceInfo {
    /// `cpu`, `cuda` or `emulator`.
    pub kind: &'static str,
    /// What it calls itself.
    pub name: String,
    /// Host threads.
    pub threads: usize,
    /// Size of the cache that operands are kept out of, in bytes.
    pub cache_bytes: usize,
}

/// One measured row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What is measured: operator, pass, model, part, precision of products. No two rows share one.
    pub name: String,
    /// The operator.
    pub operator: &'static str,
    /// Forward, backward, both fused, or an optimizer's step.
    pub pass: Pass,
    /// The model whose shape it is.
    pub model: &'static str,
    /// Sizes.
    pub shape: String,
    /// The model's own sizes, where the row's are smaller.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reduced_from: Option<String>,
    /// Least FLOP.
    pub flop: f64,
    /// Least bytes.
    pub bytes: f64,
    /// Time; on a GPU with nothing in its L2 cache. Absent on the emulator.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<Times>,
    /// Time on a GPU with the operands of the repetition before in its L2 cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_warm: Option<Times>,
    /// Least FLOP by median time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flop_per_s: Option<f64>,
    /// Least bytes by median time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<f64>,
    /// How the time compares with what the ceilings allow.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roof: Option<Roof>,
    /// Another program's time for the same, in the same run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// What the emulator counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<Counted>,
    /// Times that GPUs would take at least, by their published rates; no measurement.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub estimates: Vec<Estimate>,
    /// How it compares with the earlier results.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<Verdict>,
    /// Median time by that of the earlier results; counters: bytes by bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_to_old: Option<f64>,
}

/// The least time that the ceilings allow, as a share of the median.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Roof {
    /// At most 1, but for rows served by a cache.
    pub fraction: f64,
    /// Which ceiling is the nearer.
    pub bound: Bound,
}

/// A ceiling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// FLOP a second.
    Compute,
    /// Bytes a second.
    Memory,
}

impl Roof {
    /// For least `flop` and `bytes` in `seconds` under ceilings of FLOP and bytes a second.
    pub fn of(flop: f64, bytes: f64, seconds: f64, flop_per_s: f64, bytes_per_s: f64) -> Self {
        let (compute, memory) = (flop / flop_per_s, bytes / bytes_per_s);
        Self {
            fraction: compute.max(memory) / seconds,
            bound: match compute > memory {
                true => Bound::Compute,
                false => Bound::Memory,
            },
        }
    }
}

/// Another program's time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Peer {
    /// `cuBLASLt`, or `device copy` of as many bytes.
    pub name: &'static str,
    /// Its time.
    pub seconds: Times,
    /// Its median by the row's: above 1 the row is faster.
    pub ratio: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DeviceInfo {
            kind,
            name,
            threads,
            cache_bytes,
        } = &self.device;
        let mib = cache_bytes >> 20;
        writeln!(
            f,
            "{} on {kind}: {name}, {threads} host threads, cache {mib} MiB",
            self.program
        )?;
        if let Some(ceilings) = &self.ceilings {
            write!(f, "{ceilings}")?;
        }
        if let Some(ceilings) = &self.gpu_ceilings {
            write!(f, "{ceilings}")?;
        }
        for note in &self.notes {
            writeln!(f, "{note}")?;
        }
        if !self.rows.is_empty() {
            self.table(f)?;
        }
        if !self.without_kernel.is_empty() {
            writeln!(
                f,
                "\nNo kernel on this device yet: {}",
                self.without_kernel.join(", ")
            )?;
        }
        if !self.stages.is_empty() {
            writeln!(f, "\nWhole stages")?;
            self.stages
                .iter()
                .try_for_each(|stage| write!(f, "{stage}"))?;
        }
        write!(f, "\n{}", self.cost_model)
    }
}

impl Report {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.rows.iter().map(|row| row.name.len());
        let shapes = self.rows.iter().map(|row| row.shape.len());
        let (name, shape) = (names.max().unwrap_or(0), shapes.max().unwrap_or(0));
        let (of, size) = ("operator", "shape");
        write!(f, "\n{of:<name$}  {size:<shape$}  ")?;
        match self.device.kind {
            "emulator" => writeln!(
                f,
                "counters of the emulator, no times: bytes through L2 (of the least), launches, bank \
                 conflicts; least times by published rates, an estimate"
            )?,
            _ => writeln!(
                f,
                "{:>9} {:>22} {:>13}  of the ceiling",
                "median", "p20 to p80", "rate"
            )?,
        }
        for row in &self.rows {
            write!(f, "{:<name$}  {:<shape$}  {row}", row.name, row.shape)?;
            writeln!(f)?;
        }
        Ok(())
    }
}

/// The measurements of a row, without its name.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(times) = &self.seconds {
            let spread = format!("{} to {}", time(times.p20), time(times.p80));
            write!(
                f,
                "{:>9} {spread:>22} {:>13}",
                time(times.median),
                self.rate()
            )?;
        }
        if let Some(Roof { fraction, bound }) = self.roof {
            let bound = match bound {
                Bound::Compute => "compute",
                Bound::Memory => "memory",
            };
            write!(f, "  {:5.1} % {bound}", 100.0 * fraction)?;
        }
        if let Some(warm) = &self.seconds_warm {
            write!(f, ", warm L2 {}", time(warm.median))?;
        }
        if let Some(Peer { name, ratio, .. }) = &self.peer {
            write!(f, ", {ratio:.2} x {name}")?;
        }
        if let Some(counters) = &self.counters {
            write!(f, "{counters}")?;
        }
        for Estimate { gpu, seconds } in &self.estimates {
            write!(f, ", {gpu} {}", time(*seconds))?;
        }
        if let Some(whole) = &self.reduced_from {
            write!(f, "  (reduced from {whole})")?;
        }
        match (self.verdict, self.ratio_to_old) {
            (Some(verdict), Some(ratio)) => write!(f, "  {verdict} ({ratio:.2} of the old)"),
            (Some(verdict), None) => write!(f, "  {verdict}"),
            _ => Ok(()),
        }
    }
}

impl Row {
    /// Keeps times and the rates that follow from them.
    pub(super) fn set_times(&mut self, times: Times) {
        self.flop_per_s = Some(self.flop / times.median);
        self.bytes_per_s = Some(self.bytes / times.median);
        self.seconds = Some(times);
    }

    /// FLOP a second where arithmetic is what counts, else bytes a second.
    fn rate(&self) -> String {
        let compute = self.roof.is_none_or(|roof| roof.bound == Bound::Compute);
        match (compute, self.flop_per_s, self.bytes_per_s) {
            (true, Some(flop), _) => format!("{:.1} GFLOP/s", flop / 1e9),
            (_, _, Some(bytes)) => format!("{:.1} GB/s", bytes / 1e9),
            _ => String::new(),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Same => "same",
            Self::LessTraffic => "less traffic",
            Self::MoreTraffic => "more traffic",
            Self::New => "new",
        })
    }
}

impl fmt::Display for Ceilings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |what: &str, unit: &str, one: f64, all: f64| {
            let (one, all) = (one / 1e9, all / 1e9);
            writeln!(f, "  {what:<40} {all:8.1} {unit} ({one:.1} on one thread)")
        };
        line(
            "f32 multiply-adds in registers",
            "GFLOP/s",
            self.f32_flop_per_s_one_thread,
            self.f32_flop_per_s,
        )?;
        if let (Some(one), Some(all)) = (self.bf16_flop_per_s_one_thread, self.bf16_flop_per_s) {
            line("bf16 multiply-adds in registers", "GFLOP/s", one, all)?;
        }
        line(
            "copy beyond the caches, read + written",
            "GB/s",
            self.copy_bytes_per_s_one_thread,
            self.copy_bytes_per_s,
        )
    }
}

/// A time with three digits or so.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
