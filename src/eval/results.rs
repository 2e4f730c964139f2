//! Completions with their grades as a JSON Lines file: written as they come, read to go on or to
//! grade again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::data::Record;
use crate::error::{Error, Result};
use crate::eval::pass::{Graded, grade};
use crate::formats::atomic;
use crate::formats::lock::Lock;

/// How each line begins: an unfinished one that does not is of another program.
const BEGINNING: &[u8] = b"{\"index\":";

/// A line of the file: a graded completion and the settings that it was made with.
#[derive(Serialize, Deserialize)]
struct Line {
    #[serde(flatten)]
    graded: Graded,
    settings: Value,
}

/// The file while an evaluation writes it, and no other process does.
pub struct Results {
    path: PathBuf,
    file: Lock,
    settings: Value,
}

impl Results {
    /// A new file. `settings` is what has a part in the completions; each line holds it.
    ///
    /// # Errors
    /// Where there is such a file already.
    pub fn create(path: &Path, settings: Value) -> Result<Self> {
        let created = OpenOptions::new().write(true).create_new(true).open(path);
        let file = created.map_err(|e| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::file(path, "exists already: give --resume to go on with it")
            }
            _ => Error::io(path, e),
        })?;
        Ok(Self {
            path: path.to_owned(),
            file: lock(path, file)?,
            settings,
        })
    }

    /// Opens the file of an evaluation that did not end, with what it holds. A line that was not
    /// finished is dropped; a file that is not there is created.
    ///
    /// # Errors
    /// A file of another kind, a damaged line, or another process that writes to the file; a
    /// completion for another problem than `records` has in its place, made with other settings,
    /// or twice the same. The file stays as it was.
    pub fn resume(path: &Path, settings: Value, records: &[Record]) -> Result<(Self, Vec<Graded>)> {
        let file = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok((Self::create(path, settings)?, Vec::new()));
            }
            Err(e) => return Err(Error::io(path, e)),
        };
        let mut file = lock(path, file)?;
        let mut bytes = Vec::new();
        let read = file.file().read_to_end(&mut bytes);
        read.map_err(|e| Error::io(path, e))?;
        let end = bytes.iter().rposition(|&b| b == b'\n');
        let complete = end.map_or(0, |at| at + 1);
        let unfinished = bytes.split_off(complete);
        if !unfinished.starts_with(BEGINNING) && !BEGINNING.starts_with(&unfinished) {
            let what = "not a file of completions: its last line is not finished, nor begun as one";
            return Err(Error::file(path, what));
        }
        let mut graded = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for (number, line) in lines(path, &bytes)? {
            let line: Line = serde_json::from_value(Value::Object(line))
                .map_err(|e| Error::json_line(path, number, &e))?;
            let one = line.graded;
            let wrong = |what: String| Err(Error::file(path, format!("line {number}: {what}")));
            if line.settings != settings {
                let found = line.settings;
                return wrong(format!("expected the settings {settings}, found {found}"));
            }
            let record = records.get(one.index);
            if record.is_none_or(|r| r.problem != one.problem || r.answer != one.answer) {
                return wrong(format!("not problem {} of the data", one.index));
            }
            if !seen.insert((one.index, one.sample)) {
                let (index, sample) = (one.index, one.sample);
                return wrong(format!("sample {sample} of problem {index} is there twice"));
            }
            graded.push(one);
        }
        let cut = file.file().set_len(complete as u64);
        let placed = cut.and_then(|()| file.file().seek(SeekFrom::End(0)));
        placed.map_err(|e| Error::io(path, e))?;
        let results = Self {
            path: path.to_owned(),
            file,
            settings,
        };
        Ok((results, graded))
    }

    /// Adds a completion.
    pub fn push(&mut self, graded: &Graded) -> Result<()> {
        let line = Line {
            graded: graded.clone(),
            settings: self.settings.clone(),
        };
        let text =
            serde_json::to_string(&line).map_err(|e| Error::file(&self.path, e.to_string()))?;
        let written = self.file.file().write_all(format!("{text}\n").as_bytes());
        written.map_err(|e| Error::io(&self.path, e))
    }
}

/// Locks the file to write to.
fn lock(path: &Path, file: File) -> Result<Lock> {
    let lock = Lock::new(file).map_err(|e| Error::io(path, e))?;
    lock.ok_or_else(|| Error::file(path, "another process is writing to it"))
}

/// Completions that were graded again.
pub struct Regraded {
    /// Completions and right ones of each problem.
    pub counts: Vec<(u64, u64)>,
    /// Lines whose `correct` is another than it was.
    pub changed: usize,
    lines: Vec<Map<String, Value>>,
}

/// Grades the completions in a file, this engine's or another tool's: JSON Lines with `answer`
/// (text or number) and `completion`, the completions of one problem with the same `index`, else
/// the same `problem`; without either each line is a problem.
///
/// # Errors
/// Names the line and the key that is missing or of another type.
pub fn regrade(path: &Path) -> Result<Regraded> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let mut lines = lines(path, &bytes)?;
    if lines.is_empty() {
        return Err(Error::file(path, "holds no completions"));
    }
    let mut tally = Tally::default();
    let mut changed = 0;
    for (number, line) in &mut lines {
        let key = |key: &str| match line.get(key) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(Value::Number(n)) if key == "answer" => Ok(n.to_string()),
            _ => {
                let what = format!("line {number}: key {key:?} must be a string");
                Err(Error::file(path, what))
            }
        };
        let (extracted, correct) = grade(&key("completion")?, &key("answer")?);
        tally.add(line, correct);
        changed += usize::from(line.get("correct") != Some(&json!(correct)));
        line.insert("extracted".to_owned(), json!(extracted));
        line.insert("correct".to_owned(), json!(correct));
    }
    Ok(Regraded {
        counts: tally.counts,
        changed,
        lines: lines.into_iter().map(|(_, line)| line).collect(),
    })
}

/// Graded completions of any tool, counted.
#[derive(Default)]
pub(crate) struct Tally {
    /// Completions and right ones of each problem.
    pub counts: Vec<(u64, u64)>,
    places: HashMap<String, usize>,
}

impl Tally {
    /// Counts a line, whose problem is that of others with the same `index`, else the same
    /// `problem`, else one of its own.
    pub fn add(&mut self, line: &Map<String, Value>, correct: bool) {
        let next = self.counts.len();
        let problem = line.get("index").or(line.get("problem"));
        let place = match problem {
            Some(problem) => *self.places.entry(problem.to_string()).or_insert(next),
            None => next,
        };
        if place == next {
            self.counts.push((0, 0));
        }
        self.counts[place].0 += 1;
        self.counts[place].1 += u64::from(correct);
    }
}

impl Regraded {
    /// Writes the lines with their new grades; other keys stay as they were.
    pub fn save(&self, path: &Path) -> Result<()> {
        atomic::write(path, |out| {
            for line in &self.lines {
                serde_json::to_writer(&mut *out, line).map_err(|e| Error::io(path, e.into()))?;
                out.write_all(b"\n").map_err(|e| Error::io(path, e))?;
            }
            Ok(())
        })
    }
}

/// The objects of a JSON Lines file with their line numbers, from 1; blank lines do not count.
fn lines(path: &Path, bytes: &[u8]) -> Result<Vec<(usize, Map<String, Value>)>> {
    let mut objects = Vec::new();
    for (i, line) in bytes.split(|&b| b == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let object = serde_json::from_slice(line);
        let object = object.map_err(|e| Error::json_line(path, i + 1, &e))?;
        objects.push((i + 1, object));
    }
    Ok(objects)
}
