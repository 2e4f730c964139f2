//! What nvcc makes of the kernels: no spills, no memory of a thread's own, and registers and
//! shared memory as `kernels/static.txt` says, so that a change is seen. Needs nvcc, not a GPU.
//!
//! `RESA_BLESS=1 cargo test --test kernels` writes the table anew.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The architecture that the table is for.
const ARCHITECTURE: &str = "sm_80";

const HEADER: &str = "# kernel registers shared_bytes (static) on sm_80, nvcc 13.0";

fn kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

fn sources() -> Vec<PathBuf> {
    let entries = fs::read_dir(kernels()).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut sources: Vec<_> = paths
        .filter(|p| p.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    assert!(!sources.is_empty());
    sources
}

/// What ptxas reports for the kernels of a file.
fn ptxas(nvcc: &str, source: &Path) -> String {
    let name = source.file_stem().unwrap().to_string_lossy();
    let cubin = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.cubin"));
    let output = Command::new(nvcc)
        .args([
            "-cubin",
            "-O3",
            "-std=c++17",
            "-Xptxas",
            "-v",
            "-arch",
            ARCHITECTURE,
            "-o",
        ])
        .args([&cubin, source])
        .output()
        .unwrap();
    let report = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{report}");
    report
}

/// The number before `unit` in a line of the report; 0 where there is none.
fn number_of(line: &str, unit: &str) -> u32 {
    let Some(before) = line.find(unit).map(|end| line[..end].trim_end()) else {
        return 0;
    };
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

/// One line a kernel; fails on spills and on stack.
fn table(report: &str) -> String {
    let (mut table, mut kernel) = (String::new(), "");
    for line in report.lines() {
        if let Some((_, after)) = line.split_once("Compiling entry function '") {
            kernel = after.split('\'').next().unwrap();
        }
        for waste in [
            "bytes stack frame",
            "bytes spill stores",
            "bytes spill loads",
        ] {
            assert_eq!(number_of(line, waste), 0, "{kernel}: {line}");
        }
        let registers = number_of(line, "registers");
        if registers > 0 {
            let shared = number_of(line, "bytes smem");
            writeln!(table, "{kernel} {registers} {shared}").unwrap();
        }
    }
    table
}

#[test]
fn registers_and_shared_memory_are_those_of_the_committed_table() {
    let Some(nvcc) = option_env!("RESA_NVCC") else {
        println!("skipped: built without nvcc");
        return;
    };
    let version = Command::new(nvcc).arg("--version").output().unwrap();
    if !String::from_utf8_lossy(&version.stdout).contains("release 13.0") {
        println!("skipped: the table is for nvcc 13.0");
        return;
    }
    let mut lines: Vec<String> = Vec::new();
    for source in sources() {
        lines.extend(table(&ptxas(nvcc, &source)).lines().map(str::to_owned));
    }
    lines.sort();
    let found = format!("{HEADER}\n{}\n", lines.join("\n"));
    let path = kernels().join("static.txt");
    if std::env::var("RESA_BLESS").is_ok_and(|v| v == "1") {
        fs::write(&path, &found).unwrap();
    }
    assert_eq!(
        found,
        fs::read_to_string(&path).unwrap(),
        "if intended: RESA_BLESS=1"
    );
}

#[test]
fn every_kernel_file_has_an_operator_of_its_name() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let is_operator = |stem: &str| {
        let files = ["ops", "optim"].map(|folder| src.join(folder).join(stem));
        files
            .iter()
            .any(|f| f.is_dir() || f.with_extension("rs").is_file())
    };
    for source in sources() {
        let stem = source.file_stem().unwrap().to_string_lossy().into_owned();
        // A stem may have a file for an architecture, and a long one a file for each direction.
        let stem = stem.strip_suffix("_sm90a").unwrap_or(&stem);
        let directions = ["_forward", "_backward"];
        let stem = directions
            .iter()
            .find_map(|d| stem.strip_suffix(d))
            .unwrap_or(stem);
        // The device's own: sums of gradients, conversions.
        assert!(
            is_operator(stem) || ["add", "cast"].contains(&stem),
            "{stem} is no operator"
        );
    }
}

#[test]
#[should_panic(expected = "wasteful")]
fn a_kernel_that_spills_is_refused() {
    table(
        "ptxas info    : Compiling entry function 'wasteful' for 'sm_80'\n    \
         8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n",
    );
}
