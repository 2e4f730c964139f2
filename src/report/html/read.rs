//! What a run folder holds for the page.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
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
    completions: usize,
    correct: usize,
    /// Mean over problems of the share of correct completions.
    pass_at_1: f64,
    /// 95 % interval of that mean over problems, from its standard error.
    interval: [f64; 2],
}

/// A line of an evaluation's file; what else stands in it is not needed here.
#[derive(Deserialize)]
struct Graded {
    problem: String,
    correct: bool,
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

fn text(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::io(path, e))
}

fn json(path: &Path) -> Result<Value> {
    serde_json::from_str(&text(path)?).map_err(|e| Error::file(path, e.to_string()))
}

fn curves(path: &Path) -> Result<Vec<Curve>> {
    let mut curves: Vec<Curve> = Vec::new();
    for (number, line) in text(path)?.lines().enumerate() {
        let metrics: StepMetrics = serde_json::from_str(line)
            .map_err(|e| Error::file(path, format!("line {}: {e}", number + 1)))?;
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
    let mut problems: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for (number, line) in text(path)?.lines().enumerate() {
        let graded: Graded = match serde_json::from_str(line) {
            Ok(graded) => graded,
            // Some other file of JSON lines, such as the example's problems.
            Err(_) if number == 0 => return Ok(None),
            Err(e) => return Err(Error::file(path, format!("line {}: {e}", number + 1))),
        };
        let (all, correct) = problems.entry(graded.problem).or_default();
        *all += 1;
        *correct += usize::from(graded.correct);
    }
    if problems.is_empty() {
        return Ok(None);
    }
    let n = problems.len() as f64;
    let shares = || {
        problems
            .values()
            .map(|&(all, correct)| correct as f64 / all as f64)
    };
    let mean = shares().sum::<f64>() / n;
    let variance = shares().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let margin = 1.96 * (variance / n).sqrt();
    Ok(Some(Evaluation {
        name: path.strip_prefix(dir).unwrap_or(path).display().to_string(),
        problems: problems.len(),
        completions: problems.values().map(|p| p.0).sum(),
        correct: problems.values().map(|p| p.1).sum(),
        pass_at_1: mean,
        interval: [(mean - margin).max(0.0), (mean + margin).min(1.0)],
    }))
}
