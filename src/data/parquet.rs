//! Records out of Parquet, the format Hugging Face data sets come in.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};

use super::guard::guarded;
use super::parquet_depth::schema_depth;
use super::records::{ANSWER_KEY, Cell, PROBLEM_KEYS, Record, assemble, float_cell, quoted};
use crate::{Error, Result};

/// Groups within groups that a schema may have; data sets have a handful.
const MAX_DEPTH: usize = 100;

/// Reads all records of a Parquet file; only the columns of the known keys are decoded.
pub(super) fn read(path: &Path) -> Result<Vec<Record>> {
    let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
    match schema_depth(&mut file).map_err(|e| Error::io(path, e))? {
        Some(depth) if depth <= MAX_DEPTH => {}
        Some(depth) => {
            let what = format!("its schema is nested {depth} deep, more than {MAX_DEPTH}");
            return Err(Error::file(path, what));
        }
        None => {
            return Err(Error::file(
                path,
                "not a readable Parquet file: damaged footer",
            ));
        }
    }
    // The parquet crate has assertions and unchecked indexing behind its metadata, so a damaged
    // file can make it panic. Nothing it worked on is used afterwards.
    guarded(|| read_file(path, file))
        .unwrap_or_else(|| Err(Error::file(path, "damaged Parquet file")))
}

fn read_file(path: &Path, file: File) -> Result<Vec<Record>> {
    let damaged = |e: parquet::errors::ParquetError| {
        Error::file(path, format!("not a readable Parquet file: {e}"))
    };
    let reader = SerializedFileReader::new(file).map_err(damaged)?;
    let schema = reader.metadata().file_metadata().schema();
    let projection = Type::group_type_builder(schema.name())
        .with_fields(known_columns(path, schema.get_fields())?)
        .build()
        .map_err(damaged)?;
    let mut records = Vec::new();
    for (i, row) in reader
        .get_row_iter(Some(projection))
        .map_err(damaged)?
        .enumerate()
    {
        let row = row.map_err(|e| Error::file(path, format!("row {}: {e}", i + 1)))?;
        records.push(assemble(path, &format!("row {}", i + 1), |key| {
            cell(&row, key)
        })?);
    }
    Ok(records)
}

/// The columns that records are made of. Every row needs an answer and a problem, so a file
/// without such columns is refused before anything is decoded.
fn known_columns(path: &Path, columns: &[TypePtr]) -> Result<Vec<TypePtr>> {
    let find = |key: &str| columns.iter().find(|column| column.name() == key);
    let problems: Vec<_> = PROBLEM_KEYS.iter().filter_map(|key| find(key)).collect();
    if problems.is_empty() {
        let what = format!("no column {}", quoted(&PROBLEM_KEYS));
        return Err(Error::file(path, what));
    }
    let Some(answer) = find(ANSWER_KEY) else {
        return Err(Error::file(path, format!("no column \"{ANSWER_KEY}\"")));
    };
    let known: Vec<_> = problems
        .into_iter()
        .chain([answer])
        .map(Arc::clone)
        .collect();
    if let Some(nested) = known.iter().find(|column| !column.is_primitive()) {
        let what = format!(
            "column \"{}\" must hold strings, it is nested",
            nested.name()
        );
        return Err(Error::file(path, what));
    }
    Ok(known)
}

fn cell(row: &Row, key: &str) -> Cell {
    let Some((_, field)) = row.get_column_iter().find(|(name, _)| name.as_str() == key) else {
        return Cell::Absent;
    };
    match field {
        Field::Null => Cell::Absent,
        Field::Str(text) => Cell::Text(text.clone()),
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Cell::Text(text.to_owned()),
            Err(_) => Cell::Other("bytes that are not UTF-8"),
        },
        Field::Float(x) => float_cell(f64::from(*x)),
        Field::Double(x) => float_cell(*x),
        Field::Byte(_)
        | Field::Short(_)
        | Field::Int(_)
        | Field::Long(_)
        | Field::UByte(_)
        | Field::UShort(_)
        | Field::UInt(_)
        | Field::ULong(_)
        | Field::Decimal(_) => Cell::Number(field.to_string()),
        Field::Bool(_) => Cell::Other("a boolean"),
        _ => Cell::Other("a value of another type"),
    }
}
