//! TensorBoard event files: TFRecord frames, each with the protocol buffer `Event`. Only
//! scalars are written, so the few fields are encoded here by hand.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};
use crate::train::{Event, StepMetrics};

/// An event file that scalars are appended to.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in a folder, which is made where absent. TensorBoard reads the
    /// files of a folder one after another, so a resumed run goes on in a file of its own, and
    /// a step that comes again takes the place of the one before.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let now = wall_time();
        // Seconds first, since the files are read in the order of their names.
        let name = format!("events.out.tfevents.{:017.6}.{}", now, std::process::id());
        let path = dir.join(name);
        let mut options = OpenOptions::new();
        options.append(true).create_new(true);
        let file = options.open(&path).map_err(|e| Error::io(&path, e))?;
        let mut writer = Self { path, file };
        let mut event = Message::default();
        event.double(1, now).bytes(3, b"brain.Event:2");
        writer.write(&event)?;
        Ok(writer)
    }

    /// Appends one event with a value for each tag.
    pub fn scalars(&mut self, step: u64, values: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in values {
            let mut scalar = Message::default();
            scalar.bytes(1, tag.as_bytes()).float(2, *value as f32);
            summary.bytes(1, &scalar.0);
        }
        let mut event = Message::default();
        event
            .double(1, wall_time())
            .varint(2, step)
            .bytes(5, &summary.0);
        self.write(&event)
    }

    /// Appends one TFRecord: length, its checksum, data, their checksum.
    fn write(&mut self, event: &Message) -> Result<()> {
        let data = &event.0;
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked_crc32c(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc32c(data).to_le_bytes());
        self.file
            .write_all(&record)
            .map_err(|e| Error::io(&self.path, e))
    }
}

/// Writes the metrics of a run to an event file, which is begun at the first step.
#[derive(Debug)]
pub struct TensorBoard {
    dir: PathBuf,
    writer: Option<EventWriter>,
}

impl TensorBoard {
    /// Events of the run in folder `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            writer: None,
        }
    }

    /// Writes what a training step measured; other events are passed over. Tags are
    /// `sae/model.layers.12/fvu`, `sft/kl_per_token`, …
    pub fn record(&mut self, event: &Event) -> Result<()> {
        let Event::Step(metrics) = event else {
            return Ok(());
        };
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.writer.insert(EventWriter::create(&self.dir)?),
        };
        writer.scalars(metrics.step, &tagged(metrics))
    }
}

fn tagged(metrics: &StepMetrics) -> Vec<(String, f64)> {
    let stage = metrics.stage.name();
    let prefix = match &metrics.hookpoint {
        Some(hookpoint) => format!("{stage}/{hookpoint}"),
        None => stage.to_owned(),
    };
    let scalars = metrics.scalars();
    scalars
        .map(|(name, v)| (format!("{prefix}/{name}"), v))
        .collect()
}

fn wall_time() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |time| time.as_secs_f64())
}

/// A protocol buffer message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, field: u64, value: u64) -> &mut Self {
        self.raw_varint(field << 3);
        self.raw_varint(value);
        self
    }

    fn double(&mut self, field: u64, value: f64) -> &mut Self {
        self.raw_varint(field << 3 | 1);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(&mut self, field: u64, value: &[u8]) -> &mut Self {
        self.raw_varint(field << 3 | 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn float(&mut self, field: u64, value: f32) -> &mut Self {
        self.raw_varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

/// The checksum of a TFRecord: CRC-32C, rotated and shifted so that a checksum of data that
/// holds checksums stays a good one.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected polynomial 0x82f63b78.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    let step = |crc: u32, &byte: &u8| TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    !data.iter().fold(!0, step)
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut at = 0;
    while at < 256 {
        let mut crc = at as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 * (crc & 1));
            bit += 1;
        }
        table[at] = crc;
        at += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // The check value of CRC-32C, and RFC 3720's examples (appendix B.4).
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    }
}
