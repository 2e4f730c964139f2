//! `doctor`: what it finds, what it tests, what it advises.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

use super::bench::emulator;
use super::support::{Workshop, stderr};

fn examined(workshop: &Workshop) -> Value {
    serde_json::from_str(&workshop.prints(&["doctor", "--threads", "2", "--json"])).unwrap()
}

/// Outcomes of the self-tests on one device, with the operators they are of.
fn outcomes<'a>(report: &'a Value, device: &str, precision: &str) -> Vec<(&'a str, &'a str)> {
    let tests = report["tests"].as_array().unwrap().iter();
    let there = tests.filter(|t| t["device"] == device && t["precision"] == precision);
    there
        .map(|t| {
            (
                t["operator"].as_str().unwrap(),
                t["outcome"].as_str().unwrap(),
            )
        })
        .collect()
}

#[test]
fn every_operator_passes_its_self_test_on_the_cpu_in_both_precisions() {
    let workshop = Workshop::new(1);
    let report = examined(&workshop);
    // As many as there are tests of operators.
    let stems = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/ops")).unwrap();
    let stems = stems.filter_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let stem = name.strip_suffix(".rs")?.to_owned();
        (!["main", "harness", "cuda_device", "hopper", "traffic"].contains(&stem.as_str()))
            .then_some(stem)
    });
    let stems: BTreeSet<String> = stems.collect();
    for precision in ["f32", "bf16"] {
        let outcomes = outcomes(&report, "cpu", precision);
        let tested = outcomes.iter().map(|(operator, _)| (*operator).to_owned());
        assert_eq!(tested.collect::<BTreeSet<_>>(), stems);
        let failed: Vec<_> = outcomes.iter().filter(|(_, o)| *o != "passed").collect();
        assert!(failed.is_empty(), "{precision}: {failed:?}");
    }
    for test in report["tests"].as_array().unwrap() {
        let (error, limit) = (test["error"].as_f64(), test["limit"].as_f64());
        assert!(test["outcome"] != "passed" || error <= limit, "{test}");
    }
}

#[test]
fn a_newcomer_is_told_what_there_is_and_what_to_do() {
    let workshop = Workshop::new(1);
    let report = examined(&workshop);
    assert!(report["cpu"]["memory"].as_u64().unwrap() > 0);
    assert_eq!(report["cpu"]["threads"], 2);
    let text = workshop.prints(&["doctor"]);
    for word in ["processor", "memory", "CUDA driver", "resa-engine train"] {
        assert!(text.contains(word), "{word} in {text}");
    }
    if report["cuda"]["driver"].is_null() {
        assert!(text.contains("Everything runs on the CPU"), "{text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_device_is_tested_and_a_failing_one_ends_with_exit_code_1() {
    let workshop = Workshop::new(1);
    std::os::unix::fs::symlink(emulator(), workshop.path("libcuda.so")).unwrap();
    let doctor = |step_limit: Option<&str>| {
        let mut command = workshop.command(&["doctor", "--threads", "2", "--json"]);
        command.env("LD_LIBRARY_PATH", workshop.path(""));
        command.envs(step_limit.map(|limit| ("CUDA_EMU_STEP_LIMIT", limit)));
        command.output().unwrap()
    };
    let output = doctor(None);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    if report["cuda"]["built_for"].is_null() {
        println!("skipped: built without nvcc");
        return;
    }
    let device = &report["cuda"]["devices"][0];
    assert_eq!(device["ordinal"], 0);
    assert!(device["memory"].as_u64().unwrap() > 0);
    let outcomes = outcomes(&report, "cuda:0", "bf16");
    assert!(outcomes.len() > 10);
    for (operator, outcome) in outcomes {
        assert!(
            outcome == "passed" || outcome == "no_kernel",
            "{operator}: {outcome}"
        );
    }
    // A device on which every kernel times out.
    let output = doctor(Some("1"));
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("self-test failed"));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let advice = report["next"][0].as_str().unwrap();
    assert!(
        advice.contains("wrong results on cuda:0, or none"),
        "{advice}"
    );
}
