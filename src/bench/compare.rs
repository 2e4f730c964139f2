//! Results held against earlier ones, row by row.

use std::collections::HashMap;
use std::path::Path;

use super::report::{Report, Row};
use super::stats::{Times, Verdict, verdict};
use crate::error::Result;
use crate::formats::json::JsonObject;

/// Earlier results, as `--json` prints them.
#[derive(Clone, Debug)]
pub struct OldResults {
    /// Name of the device that they are of.
    pub device: String,
    rows: HashMap<String, Old>,
}

/// What is compared of a row.
#[derive(Clone, Copy, Debug)]
enum Old {
    Times(Times),
    /// Bytes that the emulator counted.
    Traffic(f64),
}

impl OldResults {
    /// Reads a file.
    ///
    /// # Errors
    /// What is no such file, with the key that is not what it should be.
    pub fn read(path: &Path) -> Result<Self> {
        let json = JsonObject::read(path)?;
        let device = json.required_object("device")?;
        let name = device.required_string("name")?.to_owned();
        let mut rows = HashMap::new();
        for row in json.objects("rows")? {
            let name = row.required_string("name")?.to_owned();
            let old = match row.object("seconds")? {
                Some(seconds) => Old::Times(times(&seconds)?),
                None => Old::Traffic(row.required_object("counters")?.number("bytes")?),
            };
            rows.insert(name, old);
        }
        Ok(Self { device: name, rows })
    }

    /// Gives every row its verdict.
    pub fn judge(&self, report: &mut Report) {
        let here = &report.device.name;
        if *here != self.device {
            report.notes.push(format!(
                "the earlier results are of another device, {}: verdicts mean little",
                self.device
            ));
        }
        for row in &mut report.rows {
            (row.verdict, row.ratio_to_old) = self.verdict(row);
        }
    }

    fn verdict(&self, row: &Row) -> (Option<Verdict>, Option<f64>) {
        match (self.rows.get(&row.name), &row.seconds, &row.counters) {
            (Some(Old::Times(old)), Some(new), _) => {
                (Some(verdict(old, new)), Some(new.median / old.median))
            }
            (Some(Old::Traffic(old)), None, Some(counters)) => {
                // Counters have no noise.
                let ratio = counters.bytes / old;
                let verdict = match ratio {
                    r if r < 1.0 => Verdict::LessTraffic,
                    r if r > 1.0 => Verdict::MoreTraffic,
                    _ => Verdict::Same,
                };
                (Some(verdict), Some(ratio))
            }
            _ => (Some(Verdict::New), None),
        }
    }
}

fn times(seconds: &JsonObject) -> Result<Times> {
    let positive = |key: &str| match seconds.number(key)? {
        number if number > 0.0 => Ok(number),
        _ => Err(seconds.error(key, "a number above 0")),
    };
    Ok(Times {
        median: positive("median")?,
        p20: positive("p20")?,
        p80: positive("p80")?,
        repetitions: seconds.size("repetitions")?,
    })
}
