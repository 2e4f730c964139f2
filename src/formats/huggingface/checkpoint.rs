//! The safetensors file or files of a model folder, seen as one set of tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use crate::formats::is_inside;
use crate::formats::json::JsonObject;
use crate::formats::safetensors::SafeTensors;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The open weight files of a model folder.
pub(super) struct Checkpoint {
    /// The file that lists the tensors: the index, or the only file.
    path: PathBuf,
    files: Vec<SafeTensors>,
    /// The file of each tensor, as a position in `files`.
    places: BTreeMap<String, usize>,
}

impl Checkpoint {
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(SINGLE);
        let index = dir.join(INDEX);
        if single.exists() {
            Self::single(&single)
        } else if index.exists() {
            Self::sharded(dir, index)
        } else {
            Err(Error::file(
                dir,
                format!("expected {SINGLE} or {INDEX}, found neither"),
            ))
        }
    }

    fn single(path: &Path) -> Result<Self> {
        let file = SafeTensors::open(path)?;
        Ok(Self {
            path: path.to_owned(),
            places: file.names().map(|name| (name.to_owned(), 0)).collect(),
            files: vec![file],
        })
    }

    fn sharded(dir: &Path, path: PathBuf) -> Result<Self> {
        let index = JsonObject::read(&path)?;
        let Some(Value::Object(map)) = index.get("weight_map") else {
            return Err(index.error("weight_map", "an object of tensor and file names"));
        };
        let mut files = Vec::new();
        let mut opened = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (name, shard) in map {
            let shard = shard
                .as_str()
                .filter(|shard| is_inside(Path::new(shard)))
                .ok_or_else(|| {
                    let what = format!("expected a file inside the folder, found {shard}");
                    Error::tensor(&path, name, what)
                })?;
            let place = match opened.get(shard) {
                Some(&place) => place,
                None => {
                    files.push(SafeTensors::open(dir.join(shard))?);
                    opened.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[place].contains(name) {
                return Err(Error::tensor(
                    files[place].path(),
                    name,
                    format!("missing, though {INDEX} says it is here"),
                ));
            }
            places.insert(name.clone(), place);
        }
        Ok(Self {
            path,
            files,
            places,
        })
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// The file that holds a tensor.
    pub(super) fn file(&self, name: &str) -> Result<&SafeTensors> {
        self.places
            .get(name)
            .map(|&place| &self.files[place])
            .ok_or_else(|| Error::tensor(&self.path, name, "missing"))
    }
}
