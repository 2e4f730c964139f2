//! Killed at any moment or stopped by a signal, a run goes on to the same bits.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;

use resa_engine::rng::{Purpose, Stream};

use super::support::{Left, Workshop, fixture, lines, stderr, wait_for_steps};

/// Both stages over several epochs, with a checkpoint at every other step.
const LONG: [&str; 9] = [
    "--checkpoint-every",
    "2",
    "--sae-epochs",
    "4",
    "--epochs",
    "4",
    "--shuffle",
    "--lora-dropout",
    "0.1",
];

const RESUME: [&str; 4] = ["train", "--resume", "--out", "stopped"];

#[test]
fn a_run_killed_twenty_times_at_random_moments_ends_with_the_bits_of_one_left_alone() {
    const KILLS: usize = 20;
    let workshop = Workshop::new(22);
    workshop.train("alone", &LONG);
    let (alone, run) = (workshop.path("alone"), workshop.path("stopped"));
    let steps = lines(&alone);

    let random = Stream::new(7, Purpose::Sampling, 0, 0);
    let mut killed_after = Vec::new();
    for kill in 0..KILLS {
        // One kill in each twentieth of the run: at a random step, and at a random moment of it,
        // most of which go into writing checkpoints.
        let share = kill as f32 + random.uniform(2 * kill as u64);
        let step = (share / KILLS as f32 * steps as f32) as usize;
        let pause = Duration::from_secs_f32(0.02 * random.uniform(2 * kill as u64 + 1));
        let args = match run.join("config.toml").exists() {
            true => RESUME.map(str::to_owned).to_vec(),
            false => workshop.train_args("stopped", &LONG),
        };
        let mut child = workshop.command(&args).spawn().unwrap();
        wait_for_steps(&run, step);
        sleep(pause);
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        // The kill alone may end it, or its end.
        let code = output.status.code();
        assert!(matches!(code, None | Some(0)), "{}", stderr(&output));
        killed_after.push(lines(&run));
    }
    workshop.prints(&RESUME);
    let what = format!("killed after steps {killed_after:?} of {steps}");
    assert!(killed_after[KILLS / 2] < steps, "{what}");
    Left::by(&alone).assert_same(&Left::by(&run), &what);
}

#[test]
fn an_interrupted_or_terminated_run_leaves_a_checkpoint_and_resumes_to_the_same_bits() {
    // No checkpoint would be due before the end of a stage.
    let settings = [
        "--checkpoint-every",
        "0",
        "--epochs",
        "12",
        "--sae-epochs",
        "2",
    ];
    let workshop = Workshop::new(22);
    workshop.train("alone", &settings);
    let alone = Left::by(&workshop.path("alone"));
    for name in ["INT", "TERM"] {
        let run = workshop.path("stopped");
        let args = workshop.train_args("stopped", &settings);
        let child = workshop.command(&args).spawn().unwrap();
        wait_for_steps(&run, 15);
        signal(&child, name);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
        assert!(stderr(&output).contains("interrupt again"));
        let steps = lines(&run);
        let checkpoint = run.join(format!("checkpoints/step-{steps}/state.json"));
        assert!(checkpoint.exists(), "{name}: {steps} steps");
        assert!(
            !run.join("adapter").exists(),
            "{name}: stopped before the end"
        );

        workshop.prints(&RESUME);
        alone.assert_same(&Left::by(&run), &format!("{name} after step {steps}"));
        fs::remove_dir_all(run).unwrap();
    }
}

#[test]
fn a_second_interruption_stops_at_once() {
    let workshop = Workshop::new(22);
    let problems = fixture("example/problems.jsonl");
    // One step of many seconds, so that the signals come within it.
    let settings = [
        "--data",
        problems.to_str().unwrap(),
        "--sae-batch",
        "1000",
        "--latents",
        "65536",
    ];
    let args = workshop.train_args("stopped", &settings);
    let mut child = workshop.command(&args).spawn().unwrap();
    let mut talk = BufReader::new(child.stderr.take().unwrap());
    read_until(&mut talk, "Stage I");
    signal(&child, "INT");
    read_until(&mut talk, "interrupt again");
    signal(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut rest = String::new();
    talk.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "", "nothing more is done");
    assert_eq!(lines(&workshop.path("stopped")), 0);
    assert!(fs::metadata(workshop.path("stopped/checkpoints")).is_err());
}

fn signal(child: &Child, name: &str) {
    let mut kill = Command::new("kill");
    let sent = kill.args([format!("-{name}"), child.id().to_string()]);
    assert!(sent.status().unwrap().success());
}

/// Reads lines up to and with one that contains `text`.
fn read_until(lines: &mut impl BufRead, text: &str) {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "no {text:?}");
    }
}
