//! Checkpoints: `checkpoints/step-N/`, complete or absent, never half. A checkpoint is written
//! into a folder of another name, brought to the disk, and renamed.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use super::run_dir::RunDir;
use crate::error::{Error, Result};
use crate::formats::atomic::{FileSet, remove_dir, sync_dir};
use crate::formats::safetensors::{self, Entry, SafeTensors};
use crate::tensor::{DType, Tensor};

const TENSORS: &str = "tensors.safetensors";
const STATE: &str = "state.json";
const UNFINISHED: &str = ".tmp-";

/// Everything that a run needs to go on to the same bits.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Weights and optimizer state by name, f32 or u32.
    pub tensors: Vec<(String, Tensor)>,
    /// Counters, positions in data and metrics, and whatever else is no tensor. Finite numbers
    /// come back to the same bits; JSON has no others.
    pub state: serde_json::Value,
}

/// The checkpoint that a run goes on from.
#[derive(Debug)]
pub struct Latest {
    /// The step it was saved at.
    pub step: u64,
    /// What was saved.
    pub snapshot: Snapshot,
    /// Newer checkpoints that could not be read, and why.
    pub warnings: Vec<String>,
}

#[derive(Deserialize)]
struct StateFile {
    step: u64,
    state: serde_json::Value,
}

/// Writes the checkpoint of `step` and returns its folder. When this returns, it is on the disk.
pub fn save(run: &RunDir, step: u64, snapshot: &Snapshot) -> Result<PathBuf> {
    let dir = run.checkpoints_dir();
    fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
    let unfinished = dir.join(format!("step-{step}{UNFINISHED}{}", std::process::id()));
    remove_dir(&unfinished)?;
    let written = write(&unfinished, step, snapshot);
    if written.is_err() {
        // The disk may be full: room is better than half a checkpoint. The first error counts.
        let _ = remove_dir(&unfinished);
    }
    written?;

    let finished = folder(&dir, step);
    // One of the same step can only be a damaged one that the run did not go on from.
    discard(&dir, step)?;
    fs::rename(&unfinished, &finished).map_err(|e| Error::io(&finished, e))?;
    sync_dir(&dir)?;
    Ok(finished)
}

/// Writes both files of a checkpoint and brings them to the disk.
fn write(unfinished: &Path, step: u64, snapshot: &Snapshot) -> Result<()> {
    let mut files = FileSet::new(unfinished)?;
    let tensors = snapshot.tensors.iter();
    let entries = tensors
        .map(|(name, tensor)| Entry::new(name, tensor))
        .collect();
    let path = unfinished.join(TENSORS);
    files.stage(TENSORS, |out| {
        safetensors::write_to(out, &path, entries, &BTreeMap::new())
    })?;
    files.stage_json(STATE, &json!({ "step": step, "state": snapshot.state }))?;
    files.commit()
}

/// The newest checkpoint that can be read, `None` where the run has none.
///
/// # Errors
/// What is wrong with the newest where every one is damaged.
pub fn latest(run: &RunDir) -> Result<Option<Latest>> {
    let dir = run.checkpoints_dir();
    let mut failed: Option<Error> = None;
    let mut warnings = Vec::new();
    for step in steps(run)?.into_iter().rev() {
        match load(&folder(&dir, step), step) {
            Ok(snapshot) => {
                return Ok(Some(Latest {
                    step,
                    snapshot,
                    warnings,
                }));
            }
            Err(error) => {
                warnings.push(format!("checkpoint step-{step} is damaged: {error}"));
                failed.get_or_insert(error);
            }
        }
    }
    failed.map_or(Ok(None), Err)
}

/// Removes all but the newest `keep` checkpoints up to that of `step`, the one saved last. Those
/// above it are damaged ones that the run did not go on from.
pub fn prune(run: &RunDir, step: u64, keep: usize) -> Result<()> {
    let mut kept = steps(run)?;
    let above = kept.split_off(kept.partition_point(|&s| s <= step));
    let old = kept.len().saturating_sub(keep);
    let mut removed = above.iter().chain(&kept[..old]);
    removed.try_for_each(|&step| discard(&run.checkpoints_dir(), step))
}

/// The steps that have a checkpoint, ascending.
pub fn steps(run: &RunDir) -> Result<Vec<u64>> {
    let names = entries(&run.checkpoints_dir())?;
    let numbers = names.iter().filter_map(|name| name.strip_prefix("step-"));
    let mut steps: Vec<u64> = numbers.filter_map(|n| n.parse().ok()).collect();
    steps.sort_unstable();
    Ok(steps)
}

/// Removes what writes and removals left that were killed.
pub(super) fn remove_unfinished(run: &RunDir) -> Result<()> {
    let dir = run.checkpoints_dir();
    let names = entries(&dir)?;
    let unfinished = names
        .iter()
        .filter(|name| name.starts_with("step-") && name.contains(UNFINISHED));
    for name in unfinished {
        remove_dir(&dir.join(name))?;
    }
    Ok(())
}

fn folder(dir: &Path, step: u64) -> PathBuf {
    dir.join(format!("step-{step}"))
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(dir, e)),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names
        .collect::<std::io::Result<_>>()
        .map_err(|e| Error::io(dir, e))
}

/// Removes a checkpoint; renamed first, so that a removal cut short leaves no half one.
fn discard(dir: &Path, step: u64) -> Result<()> {
    let aside = dir.join(format!("step-{step}{UNFINISHED}old-{}", std::process::id()));
    remove_dir(&aside)?;
    let finished = folder(dir, step);
    match fs::rename(&finished, &aside) {
        Ok(()) => remove_dir(&aside),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::io(&finished, e)),
    }
}

fn load(dir: &Path, step: u64) -> Result<Snapshot> {
    let path = dir.join(STATE);
    let json = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let state: StateFile =
        serde_json::from_slice(&json).map_err(|e| Error::file(&path, e.to_string()))?;
    if state.step != step {
        return Err(Error::file(
            &path,
            format!(
                "expected the state of step {step}, found step {}",
                state.step
            ),
        ));
    }
    Ok(Snapshot {
        tensors: read_tensors(&dir.join(TENSORS))?,
        state: state.state,
    })
}

fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let file = SafeTensors::open(path)?;
    let tensors = file.names().map(|name| {
        let stored = file.tensor(name)?;
        let tensor = match stored.dtype() {
            DType::U32 => stored,
            // In memory: the file may be removed while the run goes on.
            DType::F32 => stored.to_f32()?,
            other => {
                let what = format!("expected F32 or U32, found {}", other.name());
                return Err(Error::tensor(path, name, what));
            }
        };
        Ok((name.to_owned(), tensor))
    });
    tensors.collect()
}
