//! What a run folder holds for the page.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::eval::pass::pass_at_k;
use crate::eval::results::Tally;
use crate::train::{RunDir, StepMetrics};

#[derive(Serialize)]
pub(super) struct Run {
    name: String,
    settings: BTreeMap<String, String>,
    /// Each stage's curves.
    curves: Vec<Curve>,
    evaluations: Vec<Evaluation>,
    /// Contents of `features.json` files.
    features: Vec<Value>,
}

/// One measurement over the steps of a stage (and of a hookpoint in Stage I).
#[derive(Serialize)]
struct Curve {
    stage: &'static str,
    hookpoint: Option<String>,
    metric: &'static str,
    steps: Vec<u64>,
    tokens: Vec<u64>,
    values: Vec<f64>,
}

/// Graded completions of one file.
#[derive(Serialize)]
struct Evaluation {
    name: String,
    problems: usize,
    /// Completions in all: several a problem where they were sampled.
    completions: u64,
    correct: u64,
    /// Pass@1 and its 95 % interval, as [`pass_at_k`] has them.
    pass_at_1: f64,
    interval: [f64; 2],
}

/// A line of an evaluation's file.
#[derive(Deserialize)]
struct Graded {
    correct: bool,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl Run {
    pub fn read(dir: &Path) -> Result<Self> {
        let table = RunDir::read_config(dir)?.to_table()?;
        let settings = table
            .into_iter()
            .map(|(key, value)| (key, shown(&value)))
            .collect();
        let mut run = Self {
            name: dir.display().to_string(),
            settings,
            curves: curves(&dir.join("metrics.jsonl"))?,
            evaluations: Vec::new(),
            features: Vec::new(),
        };
        for path in files(dir)? {
            let name = path
                .file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default();
            if name == "features.json" {
                run.features.push(json(&path)?);
            } else if name.ends_with(".jsonl") && name != "metrics.jsonl" {
                run.evaluations.extend(evaluation(dir, &path)?);
            }
        }
        Ok(run)
    }
}

fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// The files of a folder and of the folders right below it, in the order of their names.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = |dir: &Path| -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
        let mut paths: Vec<_> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        paths.sort();
        Ok(paths)
    };
    let mut files = Vec::new();
    for path in list(dir)? {
        match path.is_dir() {
            true => files.extend(list(&path)?.into_iter().filter(|p| p.is_file())),
            false => files.push(path),
        }
    }
    Ok(files)
}

fn json(path: &Path) -> Result<Value> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::file(path, e.to_string()))
}

/// What the lines of a JSON Lines file hold. A last line that was cut off, as a full disk leaves
/// it, is passed over.
fn lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<Result<T>>> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut values = Vec::new();
    for (i, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
        match serde_json::from_slice(line.trim_ascii_end()) {
            Err(_) if !line.ends_with(b"\n") => {}
            result => values.push(result.map_err(|e| Error::json_line(path, i + 1, &e))),
        }
    }
    Ok(values)
}

fn curves(path: &Path) -> Result<Vec<Curve>> {
    let mut curves: Vec<Curve> = Vec::new();
    for metrics in lines::<StepMetrics>(path)? {
        let metrics = metrics?;
        for (metric, value) in metrics.scalars() {
            let is_it = |c: &Curve| {
                c.stage == metrics.stage.name()
                    && c.metric == metric
                    && c.hookpoint == metrics.hookpoint
            };
            let at = match curves.iter().position(is_it) {
                Some(at) => at,
                None => {
                    curves.push(Curve {
                        stage: metrics.stage.name(),
                        hookpoint: metrics.hookpoint.clone(),
                        metric,
                        steps: Vec::new(),
                        tokens: Vec::new(),
                        values: Vec::new(),
                    });
                    curves.len() - 1
                }
            };
            let curve = &mut curves[at];
            curve.steps.push(metrics.step);
            curve.tokens.push(metrics.tokens);
            curve.values.push(value);
        }
    }
    Ok(curves)
}

/// The grades in a file, where it is one of graded completions.
fn evaluation(dir: &Path, path: &Path) -> Result<Option<Evaluation>> {
    let mut tally = Tally::default();
    for graded in lines::<Graded>(path)? {
        match graded {
            Ok(graded) => tally.add(&graded.rest, graded.correct),
            // Some other file of JSON lines, such as the example's problems.
            Err(_) if tally.counts.is_empty() => return Ok(None),
            Err(e) => return Err(e),
        }
    }
    let counts = &tally.counts;
    Ok(pass_at_k(counts, 1).map(|estimate| Evaluation {
        name: path.strip_prefix(dir).unwrap_or(path).display().to_string(),
        problems: counts.len(),
        completions: counts.iter().map(|&(n, _)| n).sum(),
        correct: counts.iter().map(|&(_, c)| c).sum(),
        pass_at_1: estimate.value,
        interval: [estimate.low, estimate.high],
    }))
}
