//! JSON objects whose values are asked for by key, with errors that name the key.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Sizes in configuration files above this are refused; products of two stay far from overflow.
const MAX_SIZE: u64 = 1 << 28;

/// A JSON object of a file.
pub(crate) struct JsonObject {
    path: PathBuf,
    /// Where in the file the object is, with a final dot; empty for the whole.
    prefix: String,
    map: Map<String, Value>,
}

impl JsonObject {
    /// Reads a file that holds one JSON object.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Self {
                path: path.to_owned(),
                prefix: String::new(),
                map,
            }),
            Ok(other) => Err(Error::file(
                path,
                format!("expected a JSON object, found {}", shown(&other)),
            )),
            Err(e) => Err(Error::file(path, format!("expected JSON: {e}"))),
        }
    }

    /// The value of a key; null counts as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// All keys whose value is not null.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        let present = self.map.iter().filter(|(_, value)| !value.is_null());
        present.map(|(key, _)| key.as_str())
    }

    /// The error that `key` is not what it should be.
    pub(crate) fn error(&self, key: &str, expected: &str) -> Error {
        let found = self.get(key).map_or_else(|| "nothing".to_owned(), shown);
        Error::file(
            &self.path,
            format!(
                "key {}{key}: expected {expected}, found {found}",
                self.prefix
            ),
        )
    }

    /// The object below a key.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                path: self.path.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.error(key, "an object or null")),
        }
    }

    /// The object below a key that must be there.
    pub(crate) fn required_object(&self, key: &str) -> Result<Self> {
        let object = self.object(key)?;
        object.ok_or_else(|| self.error(key, "an object"))
    }

    /// The objects in the list below a key.
    pub(crate) fn objects(&self, key: &str) -> Result<Vec<Self>> {
        let Some(Value::Array(items)) = self.get(key) else {
            return Err(self.error(key, "a list of objects"));
        };
        let objects = items.iter().enumerate().map(|(i, item)| match item {
            Value::Object(map) => Ok(Self {
                path: self.path.clone(),
                prefix: format!("{}{key}[{i}].", self.prefix),
                map: map.clone(),
            }),
            other => Err(Error::file(
                &self.path,
                format!(
                    "key {}{key}[{i}]: expected an object, found {}",
                    self.prefix,
                    shown(other)
                ),
            )),
        });
        objects.collect()
    }

    /// A string that must be there.
    pub(crate) fn required_string(&self, key: &str) -> Result<&str> {
        let string = self.string(key)?;
        string.ok_or_else(|| self.error(key, "a string"))
    }

    /// A size of at least 1.
    pub(crate) fn size(&self, key: &str) -> Result<usize> {
        match self.get(key).and_then(Value::as_u64) {
            Some(n) if (1..=MAX_SIZE).contains(&n) => Ok(n as usize),
            _ => Err(self.error(key, &format!("a whole number from 1 to {MAX_SIZE}"))),
        }
    }

    /// A size of at least 1 where the key is present.
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|_| self.size(key)).transpose()
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<f64> {
        self.get(key)
            .and_then(Value::as_f64)
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(key, "a number"))
    }

    /// A finite number, or `default` where the key is absent.
    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        self.get(key).map_or(Ok(default), |_| self.number(key))
    }

    /// A truth value, or `default` where the key is absent.
    pub(crate) fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(self.error(key, "true or false")),
        }
    }

    /// A string, where the key is present.
    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(value)) => Ok(Some(value)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// An error unless each of the keys is absent, null, false, 0 or an empty list or object:
    /// what a feature that is switched off looks like.
    pub(crate) fn refuse_set(&self, keys: &[&str], why: &str) -> Result<()> {
        for &key in keys {
            let off = match self.get(key) {
                None | Some(Value::Bool(false)) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(Value::Object(items)) => items.is_empty(),
                Some(Value::Number(number)) => number.as_f64() == Some(0.0),
                Some(_) => false,
            };
            if !off {
                return Err(self.error(key, &format!("it to be unset ({why})")));
            }
        }
        Ok(())
    }
}

/// A value as it is shown in a message: JSON, cut after some 80 characters.
fn shown(value: &Value) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write!(text, "{value}");
    if text.chars().count() > 80 {
        text = text.chars().take(80).chain(['…']).collect();
    }
    text
}
