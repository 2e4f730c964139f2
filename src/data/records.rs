//! Problems with answers, read from JSON Lines, a JSON array or Parquet.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result};

/// A problem and its final answer; no reasoning trace is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is asked, from the key `problem`, else `question`, else `prompt`.
    pub problem: String,
    /// The final answer, from the key `answer`. A number is turned into text.
    pub answer: String,
}

/// The keys a problem may stand under; the first one present wins.
pub(super) const PROBLEM_KEYS: [&str; 3] = ["problem", "question", "prompt"];
pub(super) const ANSWER_KEY: &str = "answer";

/// Above this size a float no longer holds every integer, so its text may not be the file's.
const EXACT_FLOAT: f64 = 9_007_199_254_740_992.0;

enum Format {
    JsonLines,
    Json,
    Parquet,
}

impl Format {
    /// The format that the end of a file's name stands for.
    fn of_name(path: &Path) -> Option<Self> {
        let end = path.extension()?.to_str()?.to_ascii_lowercase();
        match end.as_str() {
            "jsonl" | "ndjson" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// Whether a file holds data, by the end of its name.
pub(crate) fn is_data(name: &str) -> bool {
    Format::of_name(Path::new(name)).is_some()
}

/// Reads all records of a file, in its order.
///
/// The format follows from the extension (`jsonl`, `ndjson`, `parquet`), else from the content:
/// Parquet starts with `PAR1`, a JSON array with `[`, anything else is taken for JSON Lines.
///
/// # Errors
/// Names the file, the line (JSON Lines) or row, both counted from 1, and the key that is
/// missing, blank or of a wrong type; also for invalid UTF-8, invalid JSON, a damaged Parquet
/// file, and a file without any record.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<Record>> {
    let path = path.as_ref();
    let records = match format_of(path)? {
        Format::Parquet => super::parquet::read(path)?,
        Format::JsonLines => read_lines(path, &read_text(path)?)?,
        Format::Json => {
            let text = read_text(path)?;
            if text.trim_start().starts_with('[') {
                read_array(path, &text)?
            } else {
                read_lines(path, &text)?
            }
        }
    };
    if records.is_empty() {
        return Err(Error::file(path, "holds no records"));
    }
    Ok(records)
}

/// Reads all records of several files, one file after the other.
///
/// # Errors
/// As [`read`].
pub fn read_all(paths: &[impl AsRef<Path>]) -> Result<Vec<Record>> {
    let files: Vec<_> = paths.iter().map(read).collect::<Result<_>>()?;
    Ok(files.concat())
}

fn format_of(path: &Path) -> Result<Format> {
    match Format::of_name(path) {
        Some(format @ (Format::JsonLines | Format::Parquet)) => Ok(format),
        Some(Format::Json) | None => {
            let mut start = Vec::new();
            File::open(path)
                .and_then(|file| file.take(4).read_to_end(&mut start))
                .map_err(|e| Error::io(path, e))?;
            Ok(if start == b"PAR1" {
                Format::Parquet
            } else {
                Format::Json
            })
        }
    }
}

/// The whole file as text, without a byte order mark.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        let line = 1 + e.as_bytes()[..at].iter().filter(|&&b| b == b'\n').count();
        Error::file(path, format!("line {line}: not valid UTF-8 at byte {at}"))
    })?;
    Ok(match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_owned(),
        None => text,
    })
}

fn read_lines(path: &Path, text: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for (i, line) in text.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = format!("line {}", i + 1);
        let value = serde_json::from_str(line).map_err(|e| Error::json_line(path, i + 1, &e))?;
        records.push(from_json(path, &place, &value)?);
    }
    Ok(records)
}

fn read_array(path: &Path, text: &str) -> Result<Vec<Record>> {
    let values: Vec<Value> = serde_json::from_str(text)
        .map_err(|e| Error::file(path, format!("not a valid JSON array: {e}")))?;
    values
        .iter()
        .enumerate()
        .map(|(i, value)| from_json(path, &format!("row {}", i + 1), value))
        .collect()
}

fn from_json(path: &Path, place: &str, value: &Value) -> Result<Record> {
    let Value::Object(object) = value else {
        let what = format!("{place}: expected a JSON object, found {}", kind(value));
        return Err(Error::file(path, what));
    };
    assemble(path, place, |key| {
        object.get(key).map_or(Cell::Absent, json_cell)
    })
}

fn json_cell(value: &Value) -> Cell {
    match value {
        Value::Null => Cell::Absent,
        Value::String(text) => Cell::Text(text.clone()),
        Value::Number(n) => match n.as_f64() {
            Some(x) if n.is_f64() => float_cell(x),
            _ => Cell::Number(n.to_string()),
        },
        other => Cell::Other(kind(other)),
    }
}

pub(super) fn float_cell(x: f64) -> Cell {
    if x.abs() < EXACT_FLOAT {
        Cell::Number(format!("{x:?}"))
    } else {
        Cell::Other("a number too large to be exact (write it as a string)")
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The value under one key of a record, whatever format it comes from.
pub(super) enum Cell {
    /// No such key, or null.
    Absent,
    Text(String),
    /// A number, written as text.
    Number(String),
    /// Anything else, in words.
    Other(&'static str),
}

/// Makes a record of the values that `get` finds under the known keys.
pub(super) fn assemble(
    path: &Path,
    place: &str,
    mut get: impl FnMut(&str) -> Cell,
) -> Result<Record> {
    let wrong = |key: &str, what: &str| Error::file(path, format!("{place}: key \"{key}\" {what}"));
    let text = |key: &str, text: String| {
        if text.trim().is_empty() {
            Err(wrong(key, "is empty"))
        } else {
            Ok(text)
        }
    };
    let mut problem = None;
    for key in PROBLEM_KEYS {
        match get(key) {
            Cell::Absent => continue,
            Cell::Text(found) => problem = Some(text(key, found)?),
            Cell::Number(_) => return Err(wrong(key, "must be a string, found a number")),
            Cell::Other(kind) => {
                return Err(wrong(key, &format!("must be a string, found {kind}")));
            }
        }
        break;
    }
    let problem = problem
        .ok_or_else(|| Error::file(path, format!("{place}: no key {}", quoted(&PROBLEM_KEYS))))?;
    let answer = match get(ANSWER_KEY) {
        Cell::Text(found) => text(ANSWER_KEY, found)?,
        Cell::Number(found) => found,
        Cell::Absent => {
            return Err(Error::file(
                path,
                format!("{place}: no key \"{ANSWER_KEY}\""),
            ));
        }
        Cell::Other(kind) => {
            let what = format!("must be a string or a number, found {kind}");
            return Err(wrong(ANSWER_KEY, &what));
        }
    };
    Ok(Record { problem, answer })
}

/// `"a", "b" or "c"`.
pub(super) fn quoted(keys: &[&str]) -> String {
    let quoted: Vec<String> = keys.iter().map(|key| format!("\"{key}\"")).collect();
    match quoted.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => quoted.concat(),
    }
}
