use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use proptest::prelude::*;
use resa_engine::Tensor;
use resa_engine::tensor::DType;
use resa_engine::train::RunDir;
use resa_engine::train::checkpoint::{self, Snapshot};
use serde_json::json;

use super::new_run;

const TENSORS: &str = "tensors.safetensors";

fn snapshot(step: u64) -> Snapshot {
    let value = step as f32;
    let weights = vec![
        value,
        -0.0,
        f32::MIN_POSITIVE / 2.0,
        f32::INFINITY,
        0.1,
        1e30,
    ];
    Snapshot {
        tensors: vec![
            ("w".to_owned(), Tensor::from_vec(weights, [2, 3]).unwrap()),
            (
                "age".to_owned(),
                Tensor::from_u32(vec![u32::MAX, 7, 0], [3]).unwrap(),
            ),
            ("none".to_owned(), Tensor::from_vec(vec![], [0, 4]).unwrap()),
        ],
        state: json!({"position": u64::MAX, "lr": 0.1, "step": step}),
    }
}

fn assert_same(read: Snapshot, step: u64) {
    let wanted = snapshot(step);
    assert_eq!(read.state, wanted.state);
    assert_eq!(read.tensors.len(), wanted.tensors.len());
    for (name, tensor) in &wanted.tensors {
        let found = read.tensors.iter().find(|(found, _)| found == name);
        let found = &found.unwrap().1;
        assert_eq!(found.shape(), tensor.shape(), "{name}");
        match tensor.dtype() {
            DType::U32 => assert_eq!(found.u32s().unwrap(), tensor.u32s().unwrap()),
            _ => assert_eq!(bits(found), bits(tensor), "{name}"),
        }
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.f32s().unwrap().iter().map(|v| v.to_bits()).collect()
}

fn reopen(run: RunDir) -> RunDir {
    let path = run.path().to_owned();
    drop(run);
    RunDir::resume(path).unwrap().0
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_comes_back_bit_for_bit() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    assert!(checkpoint::latest(&run).unwrap().is_none());
    let path = checkpoint::save(&run, 30, &snapshot(30)).unwrap();
    assert_eq!(path, run.checkpoints_dir().join("step-30"));
    let latest = checkpoint::latest(&run).unwrap().unwrap();
    assert_eq!((latest.step, latest.warnings.len()), (30, 0));
    assert_same(latest.snapshot, 30);
}

/// The folder that a child process saves checkpoints into until it is killed.
const CHILD_RUN: &str = "RESA_ENGINE_TEST_CHILD_RUN";

#[test]
fn a_loop_of_saves_leaves_the_newest_alone() {
    let temp = tempfile::tempdir().unwrap();
    let child = std::env::var_os(CHILD_RUN);
    let (run, last) = match &child {
        Some(path) => (RunDir::resume(path).unwrap().0, u64::MAX),
        None => (new_run(temp.path(), "run"), 20),
    };
    let first = checkpoint::steps(&run)
        .unwrap()
        .last()
        .map_or(1, |step| step + 1);
    for step in first..=last {
        checkpoint::save(&run, step, &snapshot(step)).unwrap();
        checkpoint::prune(&run, step, 2).unwrap();
    }
    assert_eq!(checkpoint::steps(&run).unwrap(), [19, 20]);
}

#[test]
fn a_process_killed_at_any_moment_leaves_whole_checkpoints_and_no_lock() {
    let temp = tempfile::tempdir().unwrap();
    let path = new_run(temp.path(), "run").path().to_owned();
    let mut seen = 0;
    for round in 0..20u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "checkpoint::a_loop_of_saves_leaves_the_newest_alone",
            ])
            .env(CHILD_RUN, &path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let saved = || {
            let names = names(&path.join("checkpoints"));
            names.iter().any(|name| !name.contains(".tmp-"))
        };
        while round == 0 && !saved() {
            assert!(
                child.try_wait().unwrap().is_none(),
                "the child ended by itself"
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        // Moments that are spread over the several milliseconds of a save.
        std::thread::sleep(Duration::from_micros(20_000 + 1_700 * round));
        child.kill().unwrap();
        child.wait().unwrap();

        let (run, _) = RunDir::resume(&path).unwrap();
        let latest = checkpoint::latest(&run).unwrap().unwrap();
        assert!(
            latest.step >= seen && latest.warnings.is_empty(),
            "{:?}",
            latest.warnings
        );
        seen = latest.step;
        assert_same(latest.snapshot, seen);
    }
    assert!(seen > 1, "the children saved something");
}

#[test]
fn not_a_number_keeps_its_payload() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    let odd = f32::from_bits(0x7fc0_1234);
    let mut saved = snapshot(1);
    saved.tensors = vec![("w".to_owned(), Tensor::from_vec(vec![odd], [1]).unwrap())];
    checkpoint::save(&run, 1, &saved).unwrap();
    let read = checkpoint::latest(&run).unwrap().unwrap().snapshot;
    assert_eq!(bits(&read.tensors[0].1), [0x7fc0_1234]);
}

#[test]
fn the_newest_step_is_by_number_not_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    for step in [9, 100, 20] {
        checkpoint::save(&run, step, &snapshot(step)).unwrap();
    }
    assert_eq!(checkpoint::steps(&run).unwrap(), [9, 20, 100]);
    assert_eq!(checkpoint::latest(&run).unwrap().unwrap().step, 100);
}

#[test]
fn pruning_keeps_the_newest() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    for step in 1..=5 {
        checkpoint::save(&run, step, &snapshot(step)).unwrap();
        checkpoint::prune(&run, step, 3).unwrap();
    }
    assert_eq!(
        names(&run.checkpoints_dir()),
        ["step-3", "step-4", "step-5"]
    );
}

#[test]
fn pruning_removes_damaged_checkpoints_above_the_last_and_keeps_the_good_ones() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    for step in [1, 9] {
        checkpoint::save(&run, step, &snapshot(step)).unwrap();
    }
    fs::remove_file(run.checkpoints_dir().join("step-9/state.json")).unwrap();
    assert_eq!(checkpoint::latest(&run).unwrap().unwrap().step, 1);
    // The run goes on from step 1.
    for (step, left) in [(2, &["step-1", "step-2"][..]), (3, &["step-2", "step-3"])] {
        checkpoint::save(&run, step, &snapshot(step)).unwrap();
        checkpoint::prune(&run, step, 2).unwrap();
        assert_eq!(names(&run.checkpoints_dir()), left);
    }
    assert_eq!(checkpoint::latest(&run).unwrap().unwrap().step, 3);
}

#[test]
fn what_a_killed_write_or_removal_left_is_ignored_and_cleared() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    checkpoint::save(&run, 4, &snapshot(4)).unwrap();
    let dir = run.checkpoints_dir();
    // Every moment at which a write can end: no file, half a file, all files but no rename.
    for (name, files) in [
        ("step-5.tmp-1", 0),
        ("step-6.tmp-2", 1),
        ("step-7.tmp-old-3", 2),
    ] {
        fs::create_dir(dir.join(name)).unwrap();
        for file in [TENSORS, "state.json"].iter().take(files) {
            fs::copy(dir.join("step-4").join(file), dir.join(name).join(file)).unwrap();
        }
    }
    assert_eq!(checkpoint::latest(&run).unwrap().unwrap().step, 4);
    let run = reopen(run);
    assert_eq!(names(&dir), ["step-4"]);
    assert_same(checkpoint::latest(&run).unwrap().unwrap().snapshot, 4);
}

#[test]
fn files_of_others_among_the_checkpoints_are_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    checkpoint::save(&run, 4, &snapshot(4)).unwrap();
    let dir = run.checkpoints_dir();
    for name in ["notes.tmp-1", "step-best", "step-"] {
        fs::write(dir.join(name), "").unwrap();
    }
    let run = reopen(run);
    checkpoint::prune(&run, 4, 1).unwrap();
    assert_eq!(names(&dir), ["notes.tmp-1", "step-", "step-4", "step-best"]);
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before_and_is_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    checkpoint::save(&run, 1, &snapshot(1)).unwrap();
    checkpoint::save(&run, 2, &snapshot(2)).unwrap();
    fs::remove_file(run.checkpoints_dir().join("step-2/state.json")).unwrap();
    let latest = checkpoint::latest(&run).unwrap().unwrap();
    assert_eq!(latest.step, 1);
    assert_eq!(latest.warnings.len(), 1);
    assert!(
        latest.warnings[0].contains("state.json"),
        "{:?}",
        latest.warnings
    );
    checkpoint::save(&run, 2, &snapshot(2)).unwrap();
    assert_same(checkpoint::latest(&run).unwrap().unwrap().snapshot, 2);
    assert_eq!(names(&run.checkpoints_dir()), ["step-1", "step-2"]);
}

#[test]
fn where_all_checkpoints_are_damaged_the_newest_is_named() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    for step in [1, 2] {
        let dir = checkpoint::save(&run, step, &snapshot(step)).unwrap();
        fs::write(dir.join(TENSORS), "").unwrap();
    }
    let error = checkpoint::latest(&run).unwrap_err().to_string();
    assert!(
        error.contains("step-2") && error.contains(TENSORS),
        "{error}"
    );
}

#[test]
fn the_state_of_another_step_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    let dir = checkpoint::save(&run, 1, &snapshot(1)).unwrap();
    fs::rename(&dir, run.checkpoints_dir().join("step-8")).unwrap();
    let error = checkpoint::latest(&run).unwrap_err().to_string();
    assert!(
        error.contains("step 8") && error.contains("step 1"),
        "{error}"
    );
}

#[test]
fn tensors_of_another_dtype_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let run = new_run(temp.path(), "run");
    let dir = checkpoint::save(&run, 1, &snapshot(1)).unwrap();
    let path = dir.join(TENSORS);
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(5).position(|w| w == b"\"F32\"").unwrap();
    let mut changed = bytes;
    changed[at..at + 5].copy_from_slice(b"\"I32\"");
    fs::write(&path, changed).unwrap();
    let error = checkpoint::latest(&run).unwrap_err().to_string();
    assert!(
        error.contains("tensor ") && error.contains("I32"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn numbers_of_the_state_come_back_to_the_same_bits(
        value in prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL | prop::num::f64::ZERO
    ) {
        let temp = tempfile::tempdir().unwrap();
        let run = new_run(temp.path(), "run");
        let mut saved = snapshot(1);
        saved.state = json!({ "value": value });
        checkpoint::save(&run, 1, &saved).unwrap();
        let read = checkpoint::latest(&run).unwrap().unwrap().snapshot;
        prop_assert_eq!(read.state["value"].as_f64().unwrap().to_bits(), value.to_bits());
    }

    #[test]
    fn a_truncated_file_never_passes_for_a_checkpoint(file in 0..2usize, keep in 0.0..1.0f64) {
        let temp = tempfile::tempdir().unwrap();
        let run = new_run(temp.path(), "run");
        checkpoint::save(&run, 1, &snapshot(1)).unwrap();
        let dir = checkpoint::save(&run, 2, &snapshot(2)).unwrap();
        let path = dir.join([TENSORS, "state.json"][file]);
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..(bytes.len() as f64 * keep) as usize]).unwrap();
        let latest = checkpoint::latest(&run).unwrap().unwrap();
        prop_assert_eq!(latest.step, 1);
        prop_assert_eq!(latest.warnings.len(), 1);
        assert_same(latest.snapshot, 1);
    }

    #[test]
    fn any_bytes_in_the_header_give_a_result_or_an_error(
        at in 0..200usize, value: u8
    ) {
        let temp = tempfile::tempdir().unwrap();
        let run = new_run(temp.path(), "run");
        let dir = checkpoint::save(&run, 1, &snapshot(1)).unwrap();
        let path = dir.join(TENSORS);
        let mut bytes = fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] = value;
        fs::write(&path, bytes).unwrap();
        if let Err(error) = checkpoint::latest(&run) {
            prop_assert!(error.to_string().contains(TENSORS), "{}", error);
        }
    }
}
