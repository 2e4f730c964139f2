//! Writing files and folders so that a reader, or a run after a crash, finds the old content or
//! the new, never a half.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use crate::error::{Error, Result};

/// How the names of files and folders begin that are not complete yet.
const PREFIX: &str = ".writing-";

/// A buffered file being written, with the final path for messages.
pub type Writer<'a> = BufWriter<&'a mut File>;

/// Writes one file: to a temporary file beside it, then fsync, then rename.
///
/// # Errors
/// What `write` returns, or the operating system's; the old file stays in either case.
pub fn write(path: &Path, write: impl FnOnce(&mut Writer) -> Result<()>) -> Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::file(path, "not the path of a file"))?;
    let mut set = FileSet::new(parent(path))?;
    set.stage(name, write)?;
    set.commit()
}

/// Files of one folder that belong together. All are written to temporary files first; only
/// when every one is complete do they take their places. The one staged last is the one that
/// makes the folder valid: where it changes, its old version goes first, so that a crash between
/// two renames leaves a folder that is visibly incomplete and never a mixture.
#[derive(Debug)]
pub struct FileSet {
    dir: PathBuf,
    staged: Vec<(NamedTempFile, PathBuf)>,
}

impl FileSet {
    /// Files for the folder `dir`, which is created where it does not exist.
    pub fn new(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        Ok(Self {
            dir: dir.to_owned(),
            staged: Vec::new(),
        })
    }

    /// Writes the file `name` beside its place and brings it to the disk.
    pub fn stage(
        &mut self,
        name: impl AsRef<Path>,
        write: impl FnOnce(&mut Writer) -> Result<()>,
    ) -> Result<()> {
        let path = self.dir.join(name);
        let mut temporary = builder(0o666)
            .tempfile_in(&self.dir)
            .map_err(|e| Error::io(&path, e))?;
        let mut writer = BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
        write(&mut writer)?;
        writer.flush().map_err(|e| Error::io(&path, e))?;
        drop(writer);
        temporary
            .as_file()
            .sync_all()
            .map_err(|e| Error::io(&path, e))?;
        self.staged.push((temporary, path));
        Ok(())
    }

    /// Stages a JSON file, indented as people like to read it.
    pub fn stage_json(&mut self, name: &str, value: &serde_json::Value) -> Result<()> {
        let path = self.dir.join(name);
        self.stage(name, |out| {
            serde_json::to_writer_pretty(out, value).map_err(|e| Error::io(&path, e.into()))
        })
    }

    /// Puts all staged files in their places.
    pub fn commit(self) -> Result<()> {
        if let [_, .., (new, path)] = &self.staged[..]
            && path.exists()
            && !same_content(new.path(), path)
        {
            fs::remove_file(path).map_err(|e| Error::io(path, e))?;
            sync_dir(&self.dir)?;
        }
        for (temporary, path) in self.staged {
            temporary
                .persist(&path)
                .map_err(|e| Error::io(&path, e.error))?;
        }
        sync_dir(&self.dir)
    }
}

/// Creates the folder `dir` as a whole: `fill` writes into a temporary folder beside it, which
/// is then renamed.
///
/// # Errors
/// Where `dir` exists and is not an empty folder; what `fill` returns (nothing is left behind);
/// the operating system's errors.
pub fn create_dir(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    match fs::read_dir(dir) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(Error::file(
                    dir,
                    "expected a new or empty folder to write to, found one that holds files",
                ));
            }
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io(dir, e)),
    }
    let beside = parent(dir);
    fs::create_dir_all(beside).map_err(|e| Error::io(beside, e))?;
    let temporary: TempDir = builder(0o777)
        .tempdir_in(beside)
        .map_err(|e| Error::io(dir, e))?;
    fill(temporary.path())?;
    sync_dir(temporary.path())?;
    if dir.exists() {
        fs::remove_dir(dir).map_err(|e| Error::io(dir, e))?;
    }
    fs::rename(temporary.path(), dir).map_err(|e| Error::io(dir, e))?;
    // The temporary path is gone; nothing is left to clean up.
    let _ = temporary.keep();
    sync_dir(beside)
}

/// Removes what writes left that were killed, from `dir` and the folders in it. To be called
/// only where nobody else is writing.
pub fn remove_unfinished(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(dir, e)),
    };
    for entry in entries {
        let entry = entry.map_err(|e| Error::io(dir, e))?;
        let (path, name) = (entry.path(), entry.file_name());
        let kind = entry.file_type().map_err(|e| Error::io(&path, e))?;
        if kind.is_dir() {
            remove_unfinished(&path)?;
        } else if name.to_string_lossy().starts_with(PREFIX) {
            fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// The folder a path lies in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Temporary names with the permissions that an ordinary new file or folder would get; the
/// default of temporary files, private to the user, would stay after the rename.
fn builder(mode: u32) -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

fn same_content(a: &Path, b: &Path) -> bool {
    matches!((fs::read(a), fs::read(b)), (Ok(a), Ok(b)) if a == b)
}

/// Brings a folder's entries (new names, renames) to the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|e| Error::io(dir, e))?;
    #[cfg(not(unix))]
    let _ = dir;
    Ok(())
}
