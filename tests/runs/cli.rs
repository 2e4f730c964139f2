use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn resa(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_resa-engine"))
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn usage_errors_exit_with_2_and_name_the_option() {
    let temp = tempfile::tempdir().unwrap();
    for (args, named) in [
        (&["train", "--bogus"][..], "--bogus"),
        (&["train", "--k", "many"], "--k"),
        (&["train", "--k", "0"], "--k"),
        (&["train", "--k", "9", "--latents", "8"], "--k"),
        (&["train", "--lora-dropout", "1.5"], "--lora-dropout"),
        (&["train", "--lr", "nan"], "--lr"),
        (&["train", "--stage", "both"], "--stage"),
        (
            &["train", "--layer", "3", "--hookpoint", "layers.3"],
            "--layer",
        ),
        (&["train", "--hookpoint", "transformer.h.3"], "--hookpoint"),
        (
            &["train", "--lora-targets", "q_proj,x_proj"],
            "--lora-targets",
        ),
        (&["train", "--device", "tpu"], "--device"),
        (&["train", "--seed", "9223372036854775808"], "--seed"),
        (&["train", "--k", "18446744073709551615"], "--k"),
        (&["train", "--threads", "99999999"], "--threads"),
        (&["doctor", "--threads", "99999999"], "--threads"),
        (&["bench-kernels", "--threads", "99999999"], "--threads"),
        (
            &[
                "generate",
                "--model",
                "m",
                "--prompt",
                "p",
                "--threads",
                "1025",
            ],
            "--threads",
        ),
        (
            &["eval", "--model", "m", "--data", "d", "--threads", "1025"],
            "--threads",
        ),
        (
            &[
                "features",
                "--model",
                "m",
                "--sae",
                "s",
                "--data",
                "d",
                "--threads",
                "1025",
            ],
            "--threads",
        ),
        (&["train", "--target", "model"], "--data"),
        (&["train", "--config", "absent.toml"], "absent.toml"),
        (&["eval", "--data", "x"], "--model"),
        (
            &["eval", "--model", "m", "--data", "x", "--sae", "s"],
            "--layer",
        ),
        (
            &["eval", "--model", "m", "--data", "x", "--seq-len", "1"],
            "--seq-len",
        ),
        (&["merge", "--model", "m"], "--adapter"),
        (&["completions", "tcsh"], "tcsh"),
        (&["dance"], "dance"),
    ] {
        let output = resa(temp.path(), args);
        let text = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(
            text.starts_with("error: ") && text.contains(named),
            "{args:?}: {text}"
        );
        assert!(output.stdout.is_empty());
    }
    assert_eq!(
        fs::read_dir(temp.path()).unwrap().count(),
        0,
        "nothing was written"
    );
}

/// What `train` says to options that have no effect; it must refuse them.
fn refusal(dir: &Path, args: &[&str]) -> String {
    let output = resa(dir, &[&["train"], args].concat());
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    text
}

#[test]
fn an_option_without_effect_is_refused_with_the_one_that_takes_it() {
    let temp = tempfile::tempdir().unwrap();
    let named = ["--target", "m", "--data", "d"];
    for (given, option, other) in [
        (&["--template", "t"][..], "--template", "--target"),
        (&["--elicitation-data", "e"], "--elicitation-data", "--data"),
        (&["--source-adapter", "a"], "--source-adapter", "--target"),
        (&["--sae", "s"], "--sae", "--sae-init scratch"),
    ] {
        let text = refusal(temp.path(), given);
        let both = text.starts_with(&format!("error: {option}: ")) && text.contains(other);
        assert!(both, "{given:?}: {text}");
    }
    for (with, given, option) in [
        (&["--sae", "s"][..], &["--seq-len", "64"][..], "--sae"),
        (
            &["--sae-init", "finetune", "--sae", "s"],
            &["--k", "32"],
            "--k",
        ),
        (
            &["--sae-init", "finetune", "--sae", "s"],
            &["--latents", "64"],
            "--latents",
        ),
        (
            &["--sae-init", "finetune", "--sae", "s"],
            &["--expansion", "2"],
            "--expansion",
        ),
        (
            &["--sae-init", "finetune", "--sae", "s"],
            &["--multi-topk=false"],
            "--multi-topk",
        ),
        (
            &["--sae-init", "pretrained", "--sae", "s"],
            &["--k", "32"],
            "--k",
        ),
        (
            &["--sae-init", "pretrained", "--sae", "s"],
            &["--latents", "64"],
            "--latents",
        ),
        (&["--adapter", "a"], &["--lora-r", "32"], "--lora-r"),
        (&["--adapter", "a"], &["--lora-alpha", "1"], "--lora-alpha"),
        (
            &["--adapter", "a"],
            &["--lora-targets", "q_proj"],
            "--lora-targets",
        ),
    ] {
        let args = [&named[..], with, given].concat();
        let text = refusal(temp.path(), &args);
        let (start, other) = (format!("error: {option}: "), with[0]);
        assert!(
            text.starts_with(&start) && text.contains(other),
            "{args:?}: {text}"
        );
    }
    // The file counts as the command line does.
    fs::write(temp.path().join("run.toml"), "adapter = 'a'\nlora-r = 4\n").unwrap();
    let text = refusal(temp.path(), &["--config", "run.toml"]);
    assert!(
        text.contains("--lora-r: ") && text.contains("--adapter"),
        "{text}"
    );
}

#[cfg(unix)]
#[test]
fn a_path_that_is_no_text_is_refused_with_its_option() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let temp = tempfile::tempdir().unwrap();
    for option in ["--out", "--template", "--sae", "--adapter"] {
        let output = Command::new(env!("CARGO_BIN_EXE_resa-engine"))
            .args([
                OsStr::new("train"),
                OsStr::new(option),
                OsStr::from_bytes(b"\xff"),
            ])
            .current_dir(temp.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = stderr(&output);
        assert!(text.starts_with(&format!("error: {option}: ")), "{text}");
    }
}

#[test]
fn asking_for_a_gpu_says_what_is_missing_and_writes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let args = ["train", "--target", "m", "--data", "d.jsonl", "--device"];
    let output = resa(temp.path(), &[&args[..], &["cuda"]].concat());
    let text = stderr(&output);
    assert!(!output.status.success());
    // No kernels, no driver, or, on a machine with a GPU, no model of that name.
    let named = ["CUDA toolkit", "CUDA driver", "config.json"];
    assert!(named.iter().any(|name| text.contains(name)), "{text}");
    let files = fs::read_dir(temp.path()).unwrap().count();
    assert_eq!(files, 0, "nothing was written");
}

#[test]
fn an_unknown_key_of_a_config_file_is_named_with_the_file() {
    let temp = tempfile::tempdir().unwrap();
    fs::write(temp.path().join("run.toml"), "k = 4\nresume = true\n").unwrap();
    let output = resa(temp.path(), &["train", "--config", "run.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr(&output),
        "error: run.toml: line 2: unknown field `resume`\n"
    );
}

#[test]
fn options_win_over_the_file_and_the_file_over_the_defaults() {
    let temp = tempfile::tempdir().unwrap();
    let file = "k = 40\nlatents = 32\nexclude-sinks = true\n";
    fs::write(temp.path().join("run.toml"), file).unwrap();
    let error = |args: &[&str]| {
        let args = [&["train", "--config", "run.toml"], args].concat();
        let output = resa(temp.path(), &args);
        assert_eq!(output.status.code(), Some(2));
        stderr(&output)
    };
    // The file's 40 is over the file's 32, though the default of 32 would not be.
    assert!(error(&[]).contains("--k: expected at most the 32 latents, found 40"));
    assert!(error(&["--k", "50"]).contains("found 50"));
    // --expansion takes the file's latents back, so that the next setting is what is refused.
    assert!(error(&["--expansion", "8", "--clip", "0"]).contains("--clip"));
}

#[test]
fn resuming_where_there_is_no_run_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    let output = resa(temp.path(), &["train", "--resume", "--out", "here"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.contains("no run") && text.contains("here"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn a_resumed_run_refuses_other_settings_by_their_option() {
    let temp = tempfile::tempdir().unwrap();
    drop(super::new_run(temp.path(), "resa-run"));
    let output = resa(temp.path(), &["train", "--resume", "--lora-r", "4"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).starts_with("error: --lora-r: "),
        "{}",
        stderr(&output)
    );
}

/// The arguments that a command's help lists, each with what it says of them.
fn explained(help: &str) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for line in help.lines() {
        let text = line.trim_start();
        // Text that goes on is further in than any argument.
        match (line.len() - text.len(), found.last_mut()) {
            (2..=6, _) => {
                let (name, help) = text.split_once("  ").unwrap_or((text, ""));
                found.push((name.to_owned(), help.trim().to_owned()));
            }
            (7.., Some((_, help))) => help.push_str(text),
            _ => {}
        }
    }
    found
}

#[test]
fn help_explains_every_command_and_every_option() {
    let temp = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| {
        let output = resa(temp.path(), &[args, &["--help"]].concat());
        assert!(output.status.success(), "{args:?}");
        explained(&String::from_utf8(output.stdout).unwrap())
    };
    let named = |(name, _): &&(String, String)| !name.starts_with('-') && name != "help";
    let all = help(&[]);
    let commands: Vec<&str> = all.iter().filter(named).map(|(name, _)| &**name).collect();
    assert_eq!(commands.len(), 9, "{commands:?}");
    let mut options = 0;
    for command in commands {
        for (name, help) in all.iter().chain(&help(&[command])) {
            assert!(!help.is_empty(), "{command} {name}");
            options += usize::from(name.starts_with("--"));
        }
    }
    assert!(options > 100, "{options}");
}

#[test]
fn help_of_train_states_defaults() {
    let temp = tempfile::tempdir().unwrap();
    let output = resa(temp.path(), &["train", "--help"]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for expected in [
        "[default: resa-run]",
        "Tokens in a sequence [default: 2048]",
        "[default: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "[default: 5e-3 (signum) or 2e-4 (adam) / sqrt(latents / 16384)]",
        "(AdamW, constant) [default: 1e-6]",
        "0 is off [default: 0]",
    ] {
        assert!(words.contains(expected), "{expected}");
    }
}

#[test]
fn every_setting_has_an_option_of_its_name() {
    let temp = tempfile::tempdir().unwrap();
    let output = resa(temp.path(), &["train", "--help"]);
    let help = String::from_utf8(output.stdout).unwrap();
    let full = resa_engine::train::TrainConfig {
        source: Some(String::new()),
        source_adapter: Some(String::new()),
        target: Some(String::new()),
        data: Some(String::new()),
        elicitation_data: Some(String::new()),
        template: Some(Default::default()),
        sae: Some(Default::default()),
        latents: Some(1),
        max_sae_steps: Some(1),
        max_sft_steps: Some(1),
        sae_lr: Some(1.0),
        adapter: Some(Default::default()),
        cache_memory: Some(1.0),
        ..Default::default()
    };
    let table = full.to_table().unwrap();
    assert_eq!(table.len(), 47);
    for key in table.keys() {
        let option = format!("--{key}");
        let named = help
            .split_whitespace()
            .any(|word| word.split(['[', '=']).next() == Some(&option));
        assert!(named, "{option}");
    }
}

#[test]
fn help_says_the_exit_codes_and_both_ways_to_call_eval() {
    let temp = tempfile::tempdir().unwrap();
    let help = |args: &[&str]| String::from_utf8(resa(temp.path(), args).stdout).unwrap();
    let text = help(&["--help"]);
    assert!(
        text.contains("130 interrupted") && text.contains("HF_TOKEN"),
        "{text}"
    );
    let text = help(&["eval", "--help"]);
    for way in [
        "eval --model <MODEL> --data <FILE|ID>",
        "eval --regrade <FILE>",
    ] {
        assert!(text.contains(way), "{text}");
    }
}

#[test]
fn completions_are_written_for_a_shell() {
    let temp = tempfile::tempdir().unwrap();
    let output = resa(temp.path(), &["completions", "bash"]);
    assert!(output.status.success());
    let script = String::from_utf8(output.stdout).unwrap();
    assert!(script.contains("--sae-optimizer") && script.contains("signum"));
}
