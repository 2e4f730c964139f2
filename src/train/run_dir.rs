//! The folder of a run: what it is called, who may write to it, and how files get into it whole.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::config::TrainConfig;
use super::settings::hookpoint_name;
use super::{checkpoint, example, metrics::MetricsLog};
use crate::error::{Error, Result};
use crate::formats::atomic;
use crate::formats::lock::Lock;

const LOCK: &str = ".lock";
const CONFIG: &str = "config.toml";
const ADAPTER: &str = "adapter";
const SAE: &str = "sae";
const METRICS: &str = "metrics.jsonl";

/// A run folder that this process alone trains into, for as long as the value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Whether the folder was not there before the run.
    made: bool,
    _lock: Lock,
}

impl RunDir {
    /// Makes the folder of a new run and writes `config.toml`.
    ///
    /// # Errors
    /// [`Error::Setting`] where the folder holds a run or anything else already, or another
    /// process trains into it.
    pub fn create(path: impl AsRef<Path>, config: &TrainConfig) -> Result<Self> {
        let path = path.as_ref();
        check_is_free(path)?;
        let made = !path.exists();
        fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let run = Self {
            made,
            ..Self::lock(path)?
        };
        // Another process may have made its run between the look and the lock.
        check_is_free(path)?;
        atomic::remove_unfinished(path)?;
        atomic::write_bytes(&path.join(CONFIG), config.to_toml()?.as_bytes())?;
        Ok(run)
    }

    /// Opens the folder of a run to go on with it, clears away what an interrupted write left,
    /// and reads the settings it was started with (see [`TrainConfig::check_resumes`]).
    ///
    /// # Errors
    /// [`Error::File`] where there is no run in the folder or its `config.toml` is damaged;
    /// [`Error::Setting`] where another process trains into it.
    pub fn resume(path: impl AsRef<Path>) -> Result<(Self, TrainConfig)> {
        let path = path.as_ref();
        let config = Self::read_config(path)?;
        let run = Self::lock(path)?;
        checkpoint::remove_unfinished(&run)?;
        for results in [ADAPTER, SAE] {
            atomic::remove_unfinished(&run.path.join(results))?;
        }
        Ok((run, config))
    }

    /// Clears away a run that failed before it began, so that another can take its name.
    pub(super) fn abandon(&self) {
        for file in [CONFIG, METRICS, LOCK] {
            // What cannot be removed stays: the error that ended the run is the one to tell.
            let _ = fs::remove_file(self.path.join(file));
        }
        let _ = fs::remove_dir_all(self.path.join(example::DIR));
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }

    /// The settings of the run in a folder, without opening the run.
    ///
    /// # Errors
    /// As [`RunDir::resume`].
    pub fn read_config(path: &Path) -> Result<TrainConfig> {
        let file = path.join(CONFIG);
        match fs::read_to_string(&file) {
            Ok(text) => TrainConfig::from_toml(&text, &file),
            Err(e) if e.kind() == ErrorKind::NotFound => Err(Error::file(
                path,
                format!("there is no run in it: it has no {CONFIG}"),
            )),
            Err(e) => Err(Error::io(file, e)),
        }
    }

    fn lock(path: &Path) -> Result<Self> {
        let file = path.join(LOCK);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false);
        let lock = options.open(&file).map_err(|e| Error::io(&file, e))?;
        match Lock::new(lock).map_err(|e| Error::io(&file, e))? {
            Some(lock) => Ok(Self {
                path: path.to_owned(),
                made: false,
                _lock: lock,
            }),
            None => Err(Error::setting(
                "--out",
                format!("another process is training into {}", path.display()),
            )),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the trained adapter goes, in PEFT's format.
    pub fn adapter_dir(&self) -> PathBuf {
        self.path.join(ADAPTER)
    }

    /// Where the SAE of a layer goes, in sparsify's format: `sae/model.layers.N`.
    pub fn sae_dir(&self, layer: usize) -> PathBuf {
        self.path.join(SAE).join(hookpoint_name(layer))
    }

    /// Where checkpoints are.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The file with a line for each step.
    pub fn metrics_path(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// Opens the metrics of the run: see [`MetricsLog::open`].
    pub fn metrics(&self, offset: u64) -> Result<MetricsLog> {
        MetricsLog::open(self.metrics_path(), offset)
    }
}

/// Refuses a folder with anything in it but what a run leaves that was killed before it began.
pub(super) fn check_is_free(path: &Path) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(path, e)),
    };
    for entry in entries {
        let name = entry.map_err(|e| Error::io(path, e))?.file_name();
        if name == LOCK || atomic::is_unfinished(&name) {
            continue;
        }
        let what = if path.join(CONFIG).exists() {
            "holds a run already: go on with it by --resume, or name another folder with --out"
        } else {
            "is not empty and no run: name another folder with --out"
        };
        return Err(Error::setting(
            "--out",
            format!("{} {what}", path.display()),
        ));
    }
    Ok(())
}
