//! Checkpoints: `checkpoints/step-N/`, complete or absent, never half. A checkpoint is written
//! into a folder of another name, brought to the disk, and renamed.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use super::run_dir::{RunDir, sync_dir, write_synced};
use crate::error::{Error, Result};
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

impl Snapshot {
    /// The tensor of that name, taken out.
    ///
    /// # Errors
    /// [`Error::TensorInFile`] where there is none.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        match self.tensors.iter().position(|(n, _)| n == name) {
            Some(at) => Ok(self.tensors.swap_remove(at).1),
            None => Err(Error::tensor(TENSORS, name, "missing in the checkpoint")),
        }
    }
}

/// The checkpoint that a run goes on from.
#[derive(Debug)]
pub struct Latest {
    /// The step it was saved at.
    pub step: u64,
    pub snapshot: Snapshot,
    /// Newer checkpoints that could not be read, and why.
    pub warnings: Vec<String>,
}

#[derive(Serialize, Deserialize)]
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
    fs::create_dir(unfinished).map_err(|e| Error::io(unfinished, e))?;
    write_tensors(&unfinished.join(TENSORS), &snapshot.tensors)?;
    let state = StateFile {
        step,
        state: snapshot.state.clone(),
    };
    let path = unfinished.join(STATE);
    let json = serde_json::to_vec_pretty(&state).map_err(|e| Error::file(&path, e.to_string()))?;
    write_synced(&path, &json)?;
    sync_dir(unfinished)
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

/// Removes all but the newest `keep` checkpoints.
pub fn prune(run: &RunDir, keep: usize) -> Result<()> {
    let mut old = steps(run)?;
    old.truncate(old.len().saturating_sub(keep));
    old.into_iter()
        .try_for_each(|step| discard(&run.checkpoints_dir(), step))
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

fn remove_dir(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// A tensor's bytes as they lie in memory: safetensors' order on a little-endian machine, which
/// is what the engine runs on.
struct Bytes<'a> {
    shape: &'a [usize],
    dtype: Dtype,
    data: &'a [u8],
}

impl View for Bytes<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }
    fn shape(&self) -> &[usize] {
        self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(self.data)
    }
    fn data_len(&self) -> usize {
        self.data.len()
    }
}

fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let (dtype, data) = match tensor.dtype() {
            DType::U32 => (Dtype::U32, bytemuck::cast_slice(tensor.u32s()?)),
            _ => (Dtype::F32, bytemuck::cast_slice(tensor.f32s()?)),
        };
        let shape = tensor.shape();
        views.push((name.as_str(), Bytes { shape, dtype, data }));
    }
    safetensors::serialize_to_file(views, None, path)
        .map_err(|e| Error::file(path, e.to_string()))?;
    let sync = || File::open(path)?.sync_all();
    sync().map_err(|e| Error::io(path, e))
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
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // SAFETY: nothing changes the file while it is mapped: a finished checkpoint is never
    // written to, and the lock of the run folder keeps other processes of the engine out.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
    let stored = SafeTensors::deserialize(&map).map_err(|e| Error::file(path, e.to_string()))?;
    let tensors = stored.iter().map(|(name, view)| {
        let shape = view.shape().to_vec();
        let (words, _) = view.data().as_chunks::<4>();
        let tensor = match view.dtype() {
            Dtype::F32 => Tensor::from_vec(
                words.iter().map(|w| f32::from_le_bytes(*w)).collect(),
                shape,
            ),
            Dtype::U32 => Tensor::from_u32(
                words.iter().map(|w| u32::from_le_bytes(*w)).collect(),
                shape,
            ),
            other => {
                let what = format!("expected F32 or U32, found {other:?}");
                return Err(Error::tensor(path, name, what));
            }
        };
        Ok((name.to_owned(), tensor?))
    });
    tensors.collect()
}
