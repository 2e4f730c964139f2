//! A run's folder belongs to that run.

use std::fs;
use std::process::Output;

use super::support::{Left, Workshop, metrics, stderr, wait_for_steps};

/// Checks that the program refused, and that the message names what it should.
fn assert_refused(output: &Output, code: i32, names: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for name in names {
        assert!(text.contains(name), "{name} in: {text}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn a_folder_with_a_run_or_other_files_is_refused_and_left_as_it_is() {
    let workshop = Workshop::new(22);
    workshop.train("run", &[]);
    let before = Left::by(&workshop.path("run"));
    let again = workshop.resa(&workshop.train_args("run", &["--seed", "7"]));
    assert_refused(&again, 1, &["--out", "--resume", "run"]);
    let dry = workshop.resa(&workshop.train_args("run", &["--dry-run"]));
    assert_refused(&dry, 1, &["--out", "--resume", "run"]);
    workshop.prints(&["train", "--resume", "--dry-run", "--out", "run"]);
    before.assert_same(&Left::by(&workshop.path("run")), "the first run");

    fs::create_dir(workshop.path("papers")).unwrap();
    fs::write(workshop.path("papers/notes.txt"), "mine").unwrap();
    let output = workshop.resa(&workshop.train_args("papers", &[]));
    assert_refused(&output, 1, &["--out", "papers"]);
    let entries = fs::read_dir(workshop.path("papers")).unwrap().count();
    assert_eq!(entries, 1);
}

#[test]
fn one_process_at_a_time_trains_into_a_folder() {
    let workshop = Workshop::new(22);
    // Many short steps: the first process is at work while the second tries.
    let args = workshop.train_args("run", &["--sae-epochs", "100000", "--stage", "sae"]);
    let mut first = workshop.command(&args).spawn().unwrap();
    wait_for_steps(&workshop.path("run"), 1);
    let second = workshop.resa(&["train", "--resume", "--out", "run"]);
    let new = workshop.resa(&workshop.train_args("run", &[]));
    let still_trains = first.try_wait().unwrap().is_none();
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(still_trains);
    assert_refused(&second, 1, &["--out", "another process"]);
    assert_refused(&new, 1, &["--out"]);
}

#[test]
fn a_resumed_run_may_not_change_what_has_a_part_in_its_numbers() {
    let workshop = Workshop::new(22);
    workshop.train("run", &["--max-sft-steps", "2"]);
    let before = Left::by(&workshop.path("run"));
    for changed in [
        ["--lr", "0.5"],
        ["--k", "4"],
        ["--max-sft-steps", "3"],
        ["--seed", "7"],
        ["--data", "other.jsonl"],
        ["--sae-grad", "through"],
    ] {
        let resume = ["train", "--resume", "--out", "run"];
        let output = workshop.resa(&[&resume[..], &changed].concat());
        assert_refused(&output, 2, &changed);
    }
    before.assert_same(&Left::by(&workshop.path("run")), "the run");
}

#[test]
fn a_finished_run_resumes_to_its_end_without_training_again() {
    let workshop = Workshop::new(22);
    workshop.train("run", &["--epochs", "2"]);
    let run = workshop.path("run");
    let (before, lines) = (Left::by(&run), metrics(&run));
    // Threads have no part in the numbers.
    let args = ["train", "--resume", "--out", "run", "--threads", "1"];
    let text = workshop.prints(&args);
    assert!(text.contains("Run folder"), "{text}");
    before.assert_same(&Left::by(&run), "the finished run");
    assert_eq!(lines, metrics(&run), "times are those of the only training");
}
