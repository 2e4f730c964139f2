//! One HTML page about one or several runs. It needs no network: style, script and data are in it.

mod read;

use std::path::PathBuf;

use serde::Serialize;

use crate::error::{Error, Result};
use read::Run;

/// What the page's script draws.
#[derive(Serialize)]
struct Data {
    version: &'static str,
    runs: Vec<Run>,
}

/// The page for run folders, in the given order. Beside settings and measurements it shows what
/// lies in a run's folder or in a folder right below: the results of `eval` (`*.jsonl` with one
/// graded completion a line) and of `features` (`features.json`).
///
/// # Errors
/// A folder that is no run, or a file in it that is damaged.
pub fn html(runs: &[PathBuf]) -> Result<String> {
    let data = Data {
        version: env!("CARGO_PKG_VERSION"),
        runs: runs
            .iter()
            .map(|dir| Run::read(dir))
            .collect::<Result<_>>()?,
    };
    let json = serde_json::to_string(&data)
        .map_err(|e| Error::operand("report", "data that JSON can hold", e.to_string()))?;
    // A script element ends at the first "</", whatever it stands in.
    let json = json.replace("</", "<\\/").replace("<!--", "<\\u0021--");
    Ok(include_str!("page.html")
        .replace("{{style}}", include_str!("page.css"))
        .replace("{{script}}", include_str!("page.js"))
        .replace("{{data}}", &json))
}
