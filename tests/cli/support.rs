//! A folder to work in, small settings, the program, and what a run leaves.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use resa_engine::train::{self, CancelFlag, Event, RunOptions, TrainConfig};
use resa_engine::{Error, Result};
use serde_json::Value;
use tempfile::TempDir;

/// A step of these small runs takes milliseconds, on a busy machine some more.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// A file or folder of the fixtures: below `RESA_ROOT` where that is set, for tests that run on
/// another machine than they were built on.
pub fn fixture(name: &str) -> PathBuf {
    let root = std::env::var_os("RESA_ROOT").map(PathBuf::from);
    let root = root.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    root.join("tests/fixtures").join(name)
}

/// A folder with `data.jsonl`, in which the program runs; removed when dropped.
pub struct Workshop {
    dir: TempDir,
}

impl Workshop {
    /// With the example's first `problems` problems.
    pub fn new(problems: usize) -> Self {
        let workshop = Self {
            dir: TempDir::new().unwrap(),
        };
        let all = fs::read_to_string(fixture("example/problems.jsonl")).unwrap();
        let lines: Vec<&str> = all.lines().take(problems).collect();
        fs::write(workshop.path("data.jsonl"), lines.join("\n")).unwrap();
        workshop
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The names in the folder, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The program with these arguments, not started.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_resa-engine"));
        command.args(args).current_dir(self.dir.path());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// What the program says with these arguments.
    pub fn resa<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What the program prints; it must succeed.
    pub fn prints<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> String {
        let output = self.resa(args);
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Trains into the folder `out` with the small settings and `more`; it must succeed.
    pub fn train(&self, out: &str, more: &[&str]) -> String {
        self.prints(&self.train_args(out, more))
    }

    /// The arguments of a run of the small settings, `more` in the place of equal options.
    pub fn train_args(&self, out: &str, more: &[&str]) -> Vec<String> {
        let mut args = vec!["train".to_owned(), "--out".to_owned(), out.to_owned()];
        args.extend(more.iter().map(|&m| m.to_owned()));
        let given = |option: &str| {
            let mut names = more.iter().filter_map(|arg| arg.split('=').next());
            names.any(|name| name == option)
        };
        // Those that would have no effect are refused.
        let idle = |option: &str| match option {
            "--latents" | "--k" => more.contains(&"finetune") || more.contains(&"pretrained"),
            "--lora-r" => given("--adapter"),
            _ => false,
        };
        for (option, value) in small() {
            if !given(option) && !idle(option) {
                args.extend([option.to_owned(), value]);
            }
        }
        args
    }

    /// The settings of such a run as the library takes them.
    pub fn config(&self, out: &str, toml: &str) -> TrainConfig {
        let mut table = toml::Table::new();
        for (option, value) in small() {
            let value = match value.parse::<f64>() {
                Ok(_) => value.parse().unwrap(),
                Err(_) => toml::Value::String(value),
            };
            table.insert(option[2..].to_owned(), value);
        }
        table.insert("data".to_owned(), text(&self.path("data.jsonl")));
        let more: toml::Table = toml.parse().unwrap();
        table.extend(more);
        table.insert("out".to_owned(), text(&self.path(out)));
        TrainConfig::from_table(table, Path::new("test")).unwrap()
    }
}

fn text(path: &Path) -> toml::Value {
    toml::Value::String(path.to_str().unwrap().to_owned())
}

/// Settings under which both stages take well under a second. Neither batch divides the number of
/// rows, so that every epoch ends with a smaller step.
fn small() -> Vec<(&'static str, String)> {
    let model = fixture("example/target").to_str().unwrap().to_owned();
    let template = fixture("example/template.jinja");
    let numbers = [
        ("--layer", "2"),
        ("--seq-len", "40"),
        ("--latents", "192"),
        ("--k", "8"),
        ("--sae-batch", "3"),
        ("--sft-batch", "2"),
        ("--lora-r", "3"),
        ("--lr", "0.001"),
        ("--lora-dropout", "0.0"),
        ("--checkpoint-every", "3"),
        ("--threads", "2"),
    ];
    let mut settings = vec![
        ("--target", model),
        ("--template", template.to_str().unwrap().to_owned()),
        ("--data", "data.jsonl".to_owned()),
    ];
    settings.extend(numbers.map(|(option, value)| (option, value.to_owned())));
    settings
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs as the library does; asks it to stop when step `stop_after` of all has been measured.
pub fn run(config: &TrainConfig, resume: bool, stop_after: Option<usize>) -> Result<()> {
    let cancel = CancelFlag::new();
    let mut last = None;
    let mut steps = 0;
    let mut observer = |event: &Event| {
        if let Event::Step(m) = event {
            // Several hookpoints measure the same step.
            steps += usize::from(last.replace((m.stage, m.step)) != Some((m.stage, m.step)));
            if Some(steps) == stop_after {
                cancel.cancel();
            }
        }
    };
    let result = train::run(config, RunOptions { resume }, &mut observer, &cancel);
    match (result, stop_after) {
        (Err(Error::Cancelled), Some(_)) => Ok(()),
        (Ok(_), Some(step)) => panic!("the run ended before step {step}"),
        (result, None) => result.map(drop),
        (Err(error), _) => Err(error),
    }
}

/// All that counts of a finished run: the bytes of every file of adapter and SAEs, and the
/// measurements without those of time.
#[derive(PartialEq)]
pub struct Left {
    pub files: BTreeMap<PathBuf, Vec<u8>>,
    pub metrics: Vec<Value>,
}

impl Left {
    pub fn by(run: &Path) -> Self {
        let mut files = BTreeMap::new();
        for part in ["adapter", "sae"] {
            collect(&run.join(part), run, &mut files);
        }
        assert!(!files.is_empty(), "{} has no results", run.display());
        Self {
            files,
            metrics: metrics(run)
                .into_iter()
                .map(|mut line| {
                    let line_fields = line.as_object_mut().unwrap();
                    line_fields.shift_remove("seconds").unwrap();
                    line_fields.shift_remove("tokens_per_s").unwrap();
                    line
                })
                .collect(),
        }
    }

    /// Fails with what is not the same.
    pub fn assert_same(&self, other: &Self, what: &str) {
        let lines = self.metrics.iter().zip(&other.metrics);
        for (a, b) in lines {
            assert_eq!(a, b, "{what}: measurements");
        }
        assert_eq!(self.metrics.len(), other.metrics.len(), "{what}: steps");
        let names = |left: &Self| left.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "{what}: files");
        for (name, bytes) in &self.files {
            assert!(
                *bytes == other.files[name],
                "{what}: {} differs",
                name.display()
            );
        }
    }
}

fn collect(dir: &Path, root: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, root, files);
        } else {
            let name = path.strip_prefix(root).unwrap().to_owned();
            files.insert(name, fs::read(&path).unwrap());
        }
    }
}

/// The lines of a run's metrics.jsonl.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Waits until the run in a folder has measured so many steps.
pub fn wait_for_steps(run: &Path, steps: usize) {
    let start = Instant::now();
    while lines(run) < steps {
        assert!(start.elapsed() < LONGEST_WAIT, "no step {steps}");
        sleep(Duration::from_millis(1));
    }
}

/// Complete lines of a run's metrics.jsonl so far.
pub fn lines(run: &Path) -> usize {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    text.matches('\n').count()
}

/// Copies the files of a folder into a new one.
pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}
