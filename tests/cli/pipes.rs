//! Standard output that nobody reads, or that takes nothing.

use super::support::{Workshop, fixture, stderr};

#[test]
fn a_closed_pipe_ends_a_command_quietly_and_a_run_is_complete() {
    let workshop = Workshop::new(22);
    let model = fixture("example/target").to_str().unwrap().to_owned();
    let generate = [
        "generate",
        "--raw",
        "--prompt",
        "x",
        "--max-new-tokens",
        "4",
        "--model",
    ];
    let generate = generate.iter().map(|&arg| arg.to_owned());
    for args in [
        vec!["completions".to_owned(), "bash".to_owned()],
        workshop.train_args("run", &["--dry-run"]),
        workshop.train_args("run", &["--json"]),
        generate.chain([model]).collect(),
    ] {
        let mut child = workshop.command(&args).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {error}");
        assert!(
            !error.contains("error:") && !error.contains("panicked"),
            "{error}"
        );
    }
    assert!(
        workshop
            .path("run/adapter/adapter_model.safetensors")
            .exists()
    );
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full");
    let mut command = Workshop::new(1).command(&["completions", "bash"]);
    let output = command
        .current_dir("/")
        .stdout(full.unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("standard output"),
        "{}",
        stderr(&output)
    );
}
