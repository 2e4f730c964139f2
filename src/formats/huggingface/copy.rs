//! Files of a model folder that are taken over as they are.

use std::fs;
use std::path::Path;

use crate::error::{Error, Result};
use crate::formats::atomic;

/// What belongs to a tokenizer in a model folder.
pub(in crate::formats) const TOKENIZER_FILES: [&str; 10] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// Copies the files a tokenizer consists of, those that are there, into another folder and brings
/// them to the disk.
///
/// # Errors
/// When a file cannot be read or written.
pub fn copy_tokenizer(from: impl AsRef<Path>, to: impl AsRef<Path>) -> Result<()> {
    copy_present(from.as_ref(), to.as_ref(), &TOKENIZER_FILES)
}

/// Copies those of the named files that exist.
pub(super) fn copy_present(from: &Path, to: &Path, names: &[&str]) -> Result<()> {
    for name in names {
        let source = from.join(name);
        if source.is_file() {
            let content = fs::read(&source).map_err(|e| Error::io(&source, e))?;
            atomic::write_bytes(&to.join(name), &content)?;
        }
    }
    Ok(())
}
