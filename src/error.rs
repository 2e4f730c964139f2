//! The one error type of the library.

use std::path::{Path, PathBuf};

/// What every fallible function of the library returns.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong, said so that the reader knows where to look:
/// each variant names the file, tensor, operator or option, what was expected
/// and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a file.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file was read but its content is not what it should be.
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    /// One tensor inside a file is missing or malformed.
    #[error("{}: tensor {tensor}: {what}", path.display())]
    TensorInFile {
        path: PathBuf,
        tensor: String,
        what: String,
    },
    /// An operator was called with operands that do not fit together.
    #[error("{op}: expected {expected}, got {got}")]
    Operand {
        op: &'static str,
        expected: String,
        got: String,
    },
    /// A repository of the Hugging Face hub cannot be had.
    #[error("{id}: {what}")]
    Hub { id: String, what: String },
    /// A setting has a value the engine cannot work with.
    #[error("{option}: {what}")]
    Setting { option: String, what: String },
    /// A CUDA device cannot be used, ran out of memory or failed.
    #[error("cuda:{device}: {what}")]
    Cuda { device: usize, what: String },
    /// An operator that has no version for CUDA devices.
    #[error("cuda:{device}: {op} has no CUDA kernel yet; use the CPU")]
    NoKernel { device: usize, op: String },
    /// A number that must be finite is not; training cannot go on from it.
    #[error("{what}")]
    NotFinite { what: String },
    /// The caller asked to stop; what had been reached was saved where a run folder is in use.
    #[error("cancelled")]
    Cancelled,
}

impl Error {
    /// An operating system error at `path`.
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.as_ref().to_owned(),
            source,
        }
    }

    /// A file whose content is wrong: `what` says what was expected and what was found.
    pub fn file(path: impl AsRef<Path>, what: impl Into<String>) -> Self {
        Self::File {
            path: path.as_ref().to_owned(),
            what: what.into(),
        }
    }

    /// Line `number`, from 1, of a JSON Lines file, which was read by itself and is wrong.
    pub fn json_line(path: impl AsRef<Path>, number: usize, source: &serde_json::Error) -> Self {
        // To the parser it was line 1.
        let what = source.to_string();
        let what = what.replace(" at line 1 column ", " at column ");
        Self::file(path, format!("line {number}: {what}"))
    }

    /// A missing or malformed tensor of a file.
    pub fn tensor(
        path: impl AsRef<Path>,
        tensor: impl Into<String>,
        what: impl Into<String>,
    ) -> Self {
        Self::TensorInFile {
            path: path.as_ref().to_owned(),
            tensor: tensor.into(),
            what: what.into(),
        }
    }

    /// Operands that do not fit operator `op`.
    pub fn operand(op: &'static str, expected: impl Into<String>, got: impl Into<String>) -> Self {
        Self::Operand {
            op,
            expected: expected.into(),
            got: got.into(),
        }
    }

    /// Why the hub repository `id` cannot be had.
    pub fn hub(id: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Hub {
            id: id.into(),
            what: what.into(),
        }
    }

    /// What went wrong with CUDA device number `device`.
    pub fn cuda(device: usize, what: impl Into<String>) -> Self {
        Self::Cuda {
            device,
            what: what.into(),
        }
    }

    /// A setting, named as its command-line option is (`--k`), with a value that does not work.
    pub fn setting(option: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Setting {
            option: option.into(),
            what: what.into(),
        }
    }
}
