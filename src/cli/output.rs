//! What the commands say: results on standard output, the rest on standard error.

use std::fmt::Display;
use std::io::{ErrorKind, Write, stderr, stdout};
use std::path::Path;

use resa_engine::{Error, Result};
use serde::Serialize;

const STDOUT: &str = "standard output";

/// Writes to standard output, at once.
///
/// # Errors
/// [`Error::Io`] of standard output; see [`is_closed`].
pub fn print(text: impl Display) -> Result<()> {
    let mut out = stdout().lock();
    let written = write!(out, "{text}").and_then(|()| out.flush());
    written.map_err(|e| Error::io(STDOUT, e))
}

/// Writes a line to standard output.
///
/// # Errors
/// As [`print`].
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// Writes a value to standard output as JSON, indented.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    Ok(print_line(serde_json::to_string_pretty(value)?)?)
}

/// Writes a line to standard error; where nobody can read it, the work still goes on.
pub fn note(text: impl Display) {
    let _ = writeln!(stderr(), "{text}");
}

/// Whether the error is that whoever read standard output has enough of it, as `head` has.
pub fn is_closed(error: &anyhow::Error) -> bool {
    match error.downcast_ref() {
        Some(Error::Io { path, source }) => {
            path == Path::new(STDOUT) && source.kind() == ErrorKind::BrokenPipe
        }
        _ => false,
    }
}
