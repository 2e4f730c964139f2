use std::fs;

use resa_engine::train::{MetricsLog, StepMetrics, StepStage};
use serde_json::Value;

fn sae_step(step: u64) -> StepMetrics {
    StepMetrics {
        epoch: 0.5,
        tokens: 2048 * step,
        seconds: 0.25,
        tokens_per_s: 8192.0,
        lr: 2.5e-3,
        hookpoint: Some("model.layers.12".to_owned()),
        fvu: Some(0.125),
        fvu_no_sinks: Some(0.25),
        dead_fraction: Some(0.0),
        ..StepMetrics::new(StepStage::Sae, step)
    }
}

fn lines(path: &std::path::Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn a_line_has_the_measurements_of_its_stage_and_no_others() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    log.append(&sae_step(1)).unwrap();
    let tuning = StepMetrics {
        kl: Some(3.5),
        kl_per_token: Some(0.5),
        sae_mse: Some(2.0),
        grad_norm: Some(9.0),
        ..StepMetrics::new(StepStage::Sft, 1)
    };
    log.append(&tuning).unwrap();
    let keys =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let common = [
        "stage",
        "step",
        "epoch",
        "tokens",
        "seconds",
        "tokens_per_s",
        "lr",
    ];
    let found = lines(&path);
    let sae = ["hookpoint", "fvu", "fvu_no_sinks", "dead_fraction"];
    assert_eq!(keys(&found[0]), [&common[..], &sae].concat());
    let sft = ["kl", "kl_per_token", "sae_mse", "grad_norm"];
    assert_eq!(keys(&found[1]), [&common[..], &sft].concat());
    assert_eq!(
        (&found[0]["stage"], &found[1]["stage"]),
        (&"sae".into(), &"sft".into())
    );
    assert_eq!(found[0]["tokens"], 2048);
}

#[test]
fn resuming_cuts_the_log_back_to_the_checkpoint() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    (1..=3).for_each(|step| log.append(&sae_step(step)).unwrap());
    let offset = log.offset();
    (4..=6).for_each(|step| log.append(&sae_step(step)).unwrap());
    drop(log);
    let whole = fs::read(&path).unwrap();
    // The process was killed in the middle of its last line.
    fs::write(&path, &whole[..whole.len() - 9]).unwrap();

    let mut log = MetricsLog::open(&path, offset).unwrap();
    assert_eq!(log.offset(), offset);
    (4..=6).for_each(|step| log.append(&sae_step(step)).unwrap());
    assert_eq!(fs::read(&path).unwrap(), whole);
    assert_eq!(log.offset(), whole.len() as u64);
}

#[test]
fn a_new_run_starts_an_empty_log() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("metrics.jsonl");
    fs::write(&path, "left over").unwrap();
    assert_eq!(MetricsLog::open(&path, 0).unwrap().offset(), 0);
    assert_eq!(fs::read(&path).unwrap(), b"");
}

#[test]
fn a_log_that_does_not_fit_the_checkpoint_is_refused_and_kept() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("metrics.jsonl");
    fs::write(&path, "{}\n{}\n").unwrap();
    for (offset, expected) in [(7, "found 6"), (u64::MAX, "found 6"), (4, "byte 4")] {
        let error = MetricsLog::open(&path, offset).unwrap_err().to_string();
        assert!(
            error.contains("metrics.jsonl") && error.contains(expected),
            "{error}"
        );
    }
    assert_eq!(fs::read(&path).unwrap(), b"{}\n{}\n");
}
