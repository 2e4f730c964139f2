//! `bench-kernels`: what it measures, how it compares, what it refuses.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::{Workshop, stderr};

/// Three repetitions of each row alone.
const QUICK: [&str; 5] = ["bench-kernels", "--seconds", "0", "--threads", "2"];

fn measured(workshop: &Workshop, more: &[&str]) -> Value {
    let text = workshop.prints(&[&QUICK, more, &["--json"]].concat());
    serde_json::from_str(&text).unwrap()
}

fn names(report: &Value) -> Vec<&str> {
    let rows = report["rows"].as_array().unwrap().iter();
    rows.map(|row| row["name"].as_str().unwrap()).collect()
}

#[test]
fn every_operator_is_measured_in_every_pass() {
    let workshop = Workshop::new(1);
    let report = measured(&workshop, &["--model", "example"]);
    let names = names(&report);
    let mut wanted = Vec::new();
    for pass in ["forward", "backward"] {
        for operator in ["embedding", "rmsnorm", "rope", "swiglu"] {
            wanted.push(format!("{operator} {pass} example"));
        }
        for operator in ["sparse_decode", "fvu"] {
            wanted.push(format!("{operator} {pass} example"));
        }
        for precision in ["f32", "bf16"] {
            wanted.push(format!("flash_attention {pass} example {precision}"));
            wanted.push(format!("gemm {pass} example q_proj {precision}"));
            wanted.push(format!("lora {pass} example gate_proj {precision}"));
            wanted.push(format!("topk {pass} example {precision}"));
        }
    }
    wanted.push("decode forward example gate_proj bf16".to_owned());
    wanted.push("decode forward example attention".to_owned());
    wanted.push("sample forward example".to_owned());
    for loss in ["kl_div", "cross_entropy"] {
        wanted.push(format!("{loss} forward example f32"));
        wanted.push(format!("{loss} fused example bf16"));
    }
    for optimizer in ["adamw", "signum", "clip"] {
        wanted.push(format!("{optimizer} step example"));
    }
    for name in wanted {
        assert!(names.contains(&name.as_str()), "{name} in {names:?}");
    }
    let stages = report["stages"].as_array().unwrap();
    let kinds: Vec<_> = stages
        .iter()
        .map(|s| (s["stage"].as_str(), s["epoch"].as_str()))
        .collect();
    let (first, later) = (Some("first"), Some("later"));
    assert_eq!(
        kinds,
        [
            (Some("sae"), first),
            (Some("sft"), first),
            (Some("sft"), later)
        ]
    );
    for stage in stages {
        let number = |key: &str| stage[key].as_f64().unwrap();
        let product = number("tokens_per_s") * number("flop_per_token");
        assert!(
            (number("flop_per_s") / product - 1.0).abs() < 1e-9,
            "{stage}"
        );
    }
}

#[test]
fn a_row_states_work_times_and_rates_that_belong_together() {
    let workshop = Workshop::new(1);
    let report = measured(
        &workshop,
        &["--model", "smollm2", "--filter", "gemm forward k_proj f32"],
    );
    let row = &report["rows"][0];
    assert_eq!(names(&report), ["gemm forward smollm2 k_proj f32"]);
    assert_eq!(row["shape"], "2048 x 576 x 192");
    // 2 x 2048 x 576 x 192; X, W and Y in four bytes.
    assert_eq!(row["flop"], 452_984_832.0);
    assert_eq!(row["bytes"], 4.0 * (1_179_648.0 + 110_592.0 + 393_216.0));
    let seconds = |key: &str| row["seconds"][key].as_f64().unwrap();
    assert!(seconds("p20") <= seconds("median") && seconds("median") <= seconds("p80"));
    assert!(row["seconds"]["repetitions"].as_u64().unwrap() >= 3);
    let rate = row["flop_per_s"].as_f64().unwrap();
    assert!((rate * seconds("median") / 452_984_832.0 - 1.0).abs() < 1e-9);
    let ceilings = &report["ceilings"];
    let compute = 452_984_832.0 / ceilings["f32_flop_per_s"].as_f64().unwrap();
    let memory = row["bytes"].as_f64().unwrap() / ceilings["copy_bytes_per_s"].as_f64().unwrap();
    let fraction = row["roof"]["fraction"].as_f64().unwrap();
    assert!((fraction * seconds("median") / compute.max(memory) - 1.0).abs() < 1e-9);
    assert_eq!(report["device"]["threads"], 2);
}

#[test]
fn a_row_that_is_smaller_than_the_model_says_so() {
    let workshop = Workshop::new(1);
    let args = [
        "--model",
        "qwen2-1.5b",
        "--filter",
        "clip",
        "--filter",
        "rmsnorm forward",
    ];
    let report = measured(&workshop, &args);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(
        names(&report),
        ["rmsnorm forward qwen2-1.5b", "clip step qwen2-1.5b"]
    );
    assert_eq!(rows[0].get("reduced_from"), None);
    let text = workshop.prints(&[&QUICK[..], &["--filter", "signum qwen2"]].concat());
    assert!(text.contains("(reduced from 65536 x 1536)"), "{text}");
}

/// Earlier results of one row, with these times.
fn old(path: &Path, name: &str, [p20, median, p80]: [f64; 3]) {
    let seconds = json!({"median": median, "p20": p20, "p80": p80, "repetitions": 9});
    let rows = json!([{"name": name, "seconds": seconds}]);
    let results = json!({"device": {"name": "another"}, "rows": rows});
    fs::write(path, results.to_string()).unwrap();
}

#[test]
fn each_row_is_judged_against_the_earlier_results() {
    let workshop = Workshop::new(1);
    let path = workshop.path("old.json");
    let judged = |name: &str, times: [f64; 3]| {
        old(&path, name, times);
        let args = [
            "--filter",
            "clip example",
            "--compare",
            path.to_str().unwrap(),
        ];
        let report = measured(&workshop, &args);
        assert!(report["notes"].to_string().contains("another device"));
        report["rows"][0]["verdict"].as_str().unwrap().to_owned()
    };
    let name = "clip step example";
    assert_eq!(judged(name, [1e3, 1e3, 1e3]), "faster");
    assert_eq!(judged(name, [1e-9, 1e-9, 1e-9]), "slower");
    // So noisy that nothing can be said.
    assert_eq!(judged(name, [1e-9, 1.0, 1e3]), "same");
    assert_eq!(judged("clip step of old", [1.0, 1.0, 1.0]), "new");
}

#[test]
fn earlier_results_that_make_no_sense_are_refused_by_file_and_key() {
    let workshop = Workshop::new(1);
    let path = workshop.path("old.json");
    let good = json!({"median": 1.0, "p20": 1.0, "p80": 1.0, "repetitions": 3});
    let device = json!({"name": "this"});
    for (key, results) in [
        ("device", json!({"rows": []})),
        ("device.name", json!({"device": {"name": 3}, "rows": []})),
        ("rows", json!({"device": device, "rows": 5})),
        (
            "rows[1]",
            json!({"device": device, "rows": [{"name": "a", "seconds": good}, 7]}),
        ),
        (
            "rows[0].name",
            json!({"device": device, "rows": [{"seconds": good}]}),
        ),
        (
            "rows[0].counters",
            json!({"device": device, "rows": [{"name": "a"}]}),
        ),
        (
            "rows[0].seconds.median",
            json!({"device": device, "rows": [{"name": "a", "seconds": {"median": "1"}}]}),
        ),
        (
            "rows[0].seconds.median",
            json!({"device": device, "rows": [{"name": "a", "seconds": {"median": -1.0}}]}),
        ),
    ] {
        fs::write(&path, results.to_string()).unwrap();
        let output = workshop.resa(&["bench-kernels", "--compare", "old.json"]);
        let text = stderr(&output);
        assert!(
            text.contains("old.json") && text.contains(&format!("key {key}:")),
            "{key} in {text}"
        );
        assert_eq!(output.status.code(), Some(1), "{text}");
    }
    let output = workshop.resa(&["bench-kernels", "--compare", "absent.json"]);
    assert!(
        stderr(&output).contains("absent.json"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_filter_that_names_nothing_is_an_error_that_says_what_names_are() {
    let workshop = Workshop::new(1);
    let output = workshop.resa(&["bench-kernels", "--filter", "sotfmax"]);
    let text = stderr(&output);
    assert!(
        text.contains("--filter") && text.contains("sotfmax") && text.contains("gemm forward"),
        "{text}"
    );
    assert!(!output.status.success());
}

#[test]
fn the_static_table_lists_kernels_without_measuring() {
    let workshop = Workshop::new(1);
    let text = workshop.prints(&["bench-kernels", "--static"]);
    let table =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/static.txt"));
    assert_eq!(text, table.unwrap());
    assert!(text.contains("rmsnorm_forward_bf16"));
}

/// The emulator's library, where Cargo has put it for the tests.
pub fn emulator() -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_resa-engine"))
        .parent()
        .unwrap();
    let places = ["libcuda_emulator.so", "deps/libcuda_emulator.so"].map(|name| folder.join(name));
    places.into_iter().find(|path| path.is_file()).unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn on_the_emulator_counters_stand_where_times_would() {
    let workshop = Workshop::new(1);
    std::os::unix::fs::symlink(emulator(), workshop.path("libcuda.so")).unwrap();
    let filters = [
        "--filter", "rmsnorm", "--filter", "swiglu", "--filter", "stages",
    ];
    let run = |more: &[&str]| {
        let args = [
            &QUICK[..],
            &["--device", "cuda", "--model", "smollm2"],
            &filters,
            more,
        ]
        .concat();
        let mut command = workshop.command(&args);
        command.env("LD_LIBRARY_PATH", workshop.path(""));
        command.output().unwrap()
    };
    let output = run(&["--json"]);
    if stderr(&output).contains("holds no CUDA kernels") {
        println!("skipped: built without nvcc");
        return;
    }
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["device"]["kind"], "emulator");
    assert_eq!(
        report["stages"],
        json!([]),
        "no tokens a second without times"
    );
    let row = &report["rows"][0];
    assert_eq!(row["name"], "rmsnorm forward smollm2");
    assert_eq!(row.get("seconds"), None);
    // 2048 rows of 576 bf16 values in and out, and the weight for each row.
    assert_eq!(row["bytes"], 2.0 * 2.0 * 2048.0 * 576.0);
    let counted = row["counters"]["bytes"].as_f64().unwrap();
    assert!(counted >= row["bytes"].as_f64().unwrap(), "{row}");
    assert_eq!(row["counters"]["launches"], 1.0);
    let gpus: Vec<_> = row["estimates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["gpu"])
        .collect();
    assert_eq!(gpus, ["A100", "L40S", "H100"]);

    let path = workshop.path("old.json");
    fs::write(&path, &output.stdout).unwrap();
    let again = run(&["--compare", path.to_str().unwrap()]);
    let text = String::from_utf8(again.stdout).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("rmsnorm forward"))
        .unwrap();
    assert!(line.contains("same (1.00 of the old)"), "{text}");
    assert!(
        text.contains("counters of an emulator, not times") && text.contains("an estimate"),
        "{text}"
    );
}
