//! Writing files and folders so that a reader, or a run after a crash, finds the old content or
//! the new, never a half.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::error::{Error, Result};
use crate::formats::lock::Lock;

/// How the names of files and folders begin that are not complete yet.
const PREFIX: &str = ".writing-";

/// A buffered file being written, with the final path for messages.
pub type Writer<'a> = BufWriter<&'a mut File>;

/// Writes one file: to a temporary file beside it, then fsync, then rename.
///
/// # Errors
/// What `write` returns, or the operating system's; the old file stays in either case.
pub fn write(path: &Path, write: impl FnOnce(&mut Writer) -> Result<()>) -> Result<()> {
    if fs::metadata(path).is_ok_and(|found| !found.is_file() && !found.is_dir()) {
        // Another file must not take the place of a device or pipe, such as /dev/stdout.
        let opened = File::options().write(true).open(path);
        let mut file = opened.map_err(|e| Error::io(path, e))?;
        let mut writer = BufWriter::new(&mut file);
        write(&mut writer)?;
        return writer.flush().map_err(|e| Error::io(path, e));
    }
    let name = path
        .file_name()
        .ok_or_else(|| Error::file(path, "not the path of a file"))?;
    let mut set = FileSet::new(parent(path))?;
    set.stage(name, write)?;
    set.commit()
}

/// Writes bytes as a file.
///
/// # Errors
/// As [`write()`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write(path, |out| {
        out.write_all(bytes).map_err(|e| Error::io(path, e))
    })
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
        let mut temporary = builder()
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
/// is then renamed. What a write to `dir` left there that was killed is removed.
///
/// # Errors
/// Where `dir` exists and is not an empty folder, or another process is writing it; what `fill`
/// returns (nothing is left behind); the operating system's errors.
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
    let (unfinished, lock_file) = (beside(dir, "")?, beside(dir, ".lock")?);
    // Held until the folder has its name, so that nobody takes it for one that was given up.
    let lock = claim(dir, &lock_file)?;
    let finish = || {
        remove_dir(&unfinished)?;
        fs::create_dir(&unfinished).map_err(|e| Error::io(&unfinished, e))?;
        fill(&unfinished)?;
        sync_dir(&unfinished)?;
        if dir.exists() {
            fs::remove_dir(dir).map_err(|e| Error::io(dir, e))?;
        }
        fs::rename(&unfinished, dir).map_err(|e| Error::io(dir, e))
    };
    let finished = finish();
    if finished.is_err() {
        // The first error counts.
        let _ = remove_dir(&unfinished);
    }
    // What stays is in nobody's way.
    let _ = fs::remove_file(&lock_file);
    drop(lock);
    finished?;
    sync_dir(parent(dir))
}

/// The path beside `dir` of what is used while it is written.
fn beside(dir: &Path, ending: &str) -> Result<PathBuf> {
    let name = dir.file_name();
    let name = name.ok_or_else(|| Error::file(dir, "not the path of a new folder"))?;
    let mut beside = OsString::from(PREFIX);
    beside.push(name);
    beside.push(ending);
    Ok(parent(dir).join(beside))
}

/// Makes sure that no other process writes the folder `dir`.
fn claim(dir: &Path, lock_file: &Path) -> Result<Lock> {
    let io = |e| Error::io(lock_file, e);
    fs::create_dir_all(parent(dir)).map_err(|e| Error::io(parent(dir), e))?;
    let lock = Lock::new(File::create(lock_file).map_err(io)?).map_err(io)?;
    lock.ok_or_else(|| Error::file(dir, "another process is writing it"))
}

/// Removes a folder with all in it, where there is one.
pub(crate) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
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
        } else if is_unfinished(&name) {
            fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        }
    }
    Ok(())
}

/// Whether a file of that name is one that is being written, or was.
pub(crate) fn is_unfinished(name: &OsStr) -> bool {
    name.to_string_lossy().starts_with(PREFIX)
}

/// The folder a path lies in.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Temporary names with the permissions that an ordinary new file would get; the default of
/// temporary files, private to the user, would stay after the rename.
fn builder() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_write_of_a_folder_left_is_removed_but_not_what_one_still_writes() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("merged");
        let stale = temp.path().join(".writing-merged");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("model.safetensors"), "half").unwrap();
        fs::write(temp.path().join(".writing-merged.lock"), "").unwrap();
        let names = |dir: &Path| {
            let entries = fs::read_dir(dir).unwrap();
            let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
            names.collect::<Vec<_>>()
        };
        create_dir(&dir, |new| {
            // While one writes, another is refused and removes nothing.
            write_bytes(&new.join("config.json"), b"{}")?;
            let second = create_dir(&dir, |_| Ok(())).unwrap_err().to_string();
            assert!(second.contains("another process"), "{second}");
            Ok(())
        })
        .unwrap();
        assert_eq!(names(temp.path()), ["merged"]);
        assert_eq!(names(&dir), ["config.json"]);

        let failed = create_dir(&temp.path().join("other"), |_| Err(Error::Cancelled));
        assert!(failed.is_err());
        assert_eq!(names(temp.path()), ["merged"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_written_to_and_not_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("null");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        write_bytes(&link, b"bytes").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
