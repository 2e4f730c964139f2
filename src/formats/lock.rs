//! Files that one process at a time writes to.

use std::fs::{File, TryLockError};

/// An open file that no other process has locked. The operating system releases the lock when the
/// process ends, however it ends.
#[derive(Debug)]
pub struct Lock(File);

impl Lock {
    /// Locks a file; `None` where another process has.
    ///
    /// # Errors
    /// The operating system's.
    pub fn new(file: File) -> std::io::Result<Option<Self>> {
        match file.try_lock() {
            Ok(()) => Ok(Some(Self(file))),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(e),
        }
    }

    /// The file.
    pub fn file(&mut self) -> &mut File {
        &mut self.0
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing would not do: a process that another thread has just forked has the file open
        // too, until it becomes another program. What fails here, the end of the process mends.
        drop(self.0.unlock());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_free_again_though_a_forked_process_has_it_open() {
        let dir = tempfile::tempdir().unwrap();
        let lock = || Lock::new(File::create(dir.path().join("lock")).unwrap()).unwrap();
        let mut first = lock().unwrap();
        assert!(lock().is_none());
        // The same open file, as a fork has it.
        let open = first.file().try_clone().unwrap();
        drop(first);
        assert!(lock().is_some());
        drop(open);
    }
}
