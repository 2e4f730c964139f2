use std::fs;

use resa_engine::train::{RunDir, TrainConfig};

use super::new_run;

fn refusal(result: resa_engine::Result<impl std::fmt::Debug>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn a_new_run_writes_down_all_its_settings() {
    let temp = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        k: 7,
        ..TrainConfig::default()
    };
    let path = temp.path().join("deep/down");
    drop(RunDir::create(&path, &config).unwrap());
    let text = fs::read_to_string(path.join("config.toml")).unwrap();
    assert!(
        text.contains("k = 7\n") && text.contains("sae-grad = \"stop\""),
        "{text}"
    );
    let (run, stored) = RunDir::resume(&path).unwrap();
    assert_eq!(stored, config);
    assert_eq!(run.sae_dir(12), path.join("sae/model.layers.12"));
}

#[test]
fn a_folder_with_a_run_is_not_started_over() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    let path = run.path().to_owned();
    drop(run);
    let config = TrainConfig::default();
    let error = refusal(RunDir::create(&path, &config));
    assert!(
        error.contains("--resume") && error.contains("run"),
        "{error}"
    );
    assert!(RunDir::resume(&path).is_ok());
}

#[test]
fn a_folder_with_other_files_is_left_as_it_was() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("thesis.txt"), "words").unwrap();
    let error = refusal(RunDir::create(temp.path(), &TrainConfig::default()));
    assert!(
        error.contains("--out") && error.contains("not empty"),
        "{error}"
    );
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn a_run_killed_before_it_began_does_not_block_its_folder() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join(".lock"), "").unwrap();
    let unfinished = temp.path().join(".writing-x1y2z3");
    fs::write(&unfinished, "stage = ").unwrap();
    RunDir::create(temp.path(), &TrainConfig::default()).unwrap();
    assert!(!unfinished.exists());
}

#[test]
fn two_owners_cannot_hold_one_run() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    let path = run.path().to_owned();
    let error = refusal(RunDir::resume(&path));
    assert!(error.contains("another process"), "{error}");
    drop(run);
    RunDir::resume(&path).unwrap();
}

#[test]
fn resuming_where_there_is_no_run_says_so() {
    let temp = tempfile::tempdir().unwrap();
    let error = refusal(RunDir::resume(temp.path()));
    assert!(
        error.contains("no run") && error.contains("config.toml"),
        "{error}"
    );
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
}

#[test]
fn damaged_settings_of_a_run_are_an_error_with_the_file() {
    let temp = tempfile::tempdir().unwrap();
    for text in ["stage = \"a", "colour = 1", "\0"] {
        fs::write(temp.path().join("config.toml"), text).unwrap();
        let error = refusal(RunDir::resume(temp.path()));
        assert!(error.contains("config.toml"), "{error}");
    }
}
