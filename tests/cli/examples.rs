//! The library in other programs: the examples run and train.

use std::path::PathBuf;
use std::process::Command;

use super::support::{Workshop, fixture, metrics, stderr};

/// What an example prints. Cargo has built it with the tests, or does so now.
fn example(name: &str, args: &[PathBuf]) -> String {
    let profile = match cfg!(debug_assertions) {
        true => "dev",
        false => "release",
    };
    let mut program = Command::new(env!("CARGO"));
    program.current_dir(env!("CARGO_MANIFEST_DIR"));
    // What Cargo has told this test of its package. The build scripts of some dependencies ask to
    // be run again, and what depends on them built again, when these variables change.
    let about_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "OUT_DIR"];
    for (name, _) in std::env::vars_os() {
        let is_told = |start: &&str| name.to_string_lossy().starts_with(*start);
        if about_package.iter().any(is_told) {
            program.env_remove(name);
        }
    }
    program.args([
        "run",
        "--quiet",
        "--profile",
        profile,
        "--example",
        name,
        "--",
    ]);
    let output = program.args(args).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// The numbers at the ends of the lines that begin with `start`.
fn numbers(text: &str, start: &str) -> Vec<f64> {
    let lines = text.lines().filter(|line| line.starts_with(start));
    let last = |line: &str| line.split(' ').next_back().unwrap().parse().unwrap();
    lines.map(last).collect()
}

#[test]
fn a_program_runs_watches_stops_and_resumes_training() {
    let workshop = Workshop::new(22);
    let run = workshop.path("run");
    let args = [
        fixture("example/target"),
        workshop.path("data.jsonl"),
        run.clone(),
    ];
    let text = example("embed", &args);
    let steps = metrics(&run);
    assert_eq!(steps.len(), 40);
    let seen = text.lines().filter(|line| line.contains(" step ")).count();
    assert_eq!(seen, steps.len(), "every step is seen once");
    let lines: Vec<_> = text.lines().collect();
    assert!(lines[5].starts_with("stopped after 5 steps"), "{text}");
    assert!(text.contains("FVU at layer 2") && text.contains("KL divergence"));
    assert!(run.join("adapter/adapter_config.json").exists());
}

#[test]
fn a_program_trains_step_by_step() {
    let workshop = Workshop::new(22);
    let args = [fixture("example/target"), workshop.path("data.jsonl")];
    let text = example("stages", &args);
    for stage in ["Stage I,", "Stage II,"] {
        let losses = numbers(&text, stage);
        assert_eq!(losses.len(), 16);
        let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
        assert!(
            mean(&losses[12..]) < mean(&losses[..4]),
            "{stage} {losses:?}"
        );
    }
}
