//! Which files of a repository the engine reads.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;

use super::Want;
use crate::data::records::is_data;
use crate::formats::huggingface::TOKENIZER_FILES;
use crate::formats::is_inside;

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// The names, of those that a repository has, to fetch; of a sharded model the index alone, the
/// rest is in [`shards`].
///
/// # Errors
/// What was expected and is not there, in words.
pub(super) fn wanted(want: Want, names: &[String]) -> Result<Vec<String>, String> {
    let has = |name: &str| names.iter().any(|n| n == name);
    let all = |wanted: &[&str]| match wanted.iter().find(|name| !has(name)) {
        Some(missing) => Err(format!("expected {missing} in it, found none")),
        None => Ok(wanted.iter().map(|&name| name.to_owned()).collect()),
    };
    match want {
        Want::Model => {
            let weights = if has(SINGLE) || !has(INDEX) {
                SINGLE
            } else {
                INDEX
            };
            let mut files: Vec<String> = all(&["config.json", weights])?;
            let beside = TOKENIZER_FILES.iter().chain(&["generation_config.json"]);
            let beside = beside.filter(|name| has(name));
            files.extend(beside.map(|&name| name.to_owned()));
            Ok(files)
        }
        Want::ModelOrAdapter if !has("adapter_config.json") => wanted(Want::Model, names),
        Want::Adapter | Want::ModelOrAdapter => {
            all(&["adapter_config.json", "adapter_model.safetensors"])
        }
        Want::Sae(layer) => saes(layer, names),
        Want::Data => training_split(names),
    }
}

/// The SAE at the top, or those of one layer or of all layers in folders of their names.
fn saes(layer: Option<usize>, names: &[String]) -> Result<Vec<String>, String> {
    let is_wanted = |folder: &str| {
        let number = folder.strip_prefix("model.").unwrap_or(folder);
        let number = number.strip_prefix("layers.").map(str::parse::<usize>);
        match (number, layer) {
            (Some(Ok(number)), Some(layer)) => number == layer,
            (Some(Ok(_)), None) => true,
            _ => folder.is_empty(),
        }
    };
    let is_part = |name: &str| {
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        ["cfg.json", "sae.safetensors"].contains(&file) && is_wanted(folder)
    };
    let files: Vec<String> = names.iter().filter(|name| is_part(name)).cloned().collect();
    match files.iter().any(|name| name.ends_with("cfg.json")) {
        true => Ok(files),
        false => Err(match layer {
            Some(n) => format!("expected layers.{n}/cfg.json or cfg.json in it, found neither"),
            None => "expected layers.N/cfg.json in it, found none".to_owned(),
        }),
    }
}

/// The data files that have `train` in their name or folder, or all where none names any split.
fn training_split(names: &[String]) -> Result<Vec<String>, String> {
    let mentions = |name: &str, words: &[&str]| {
        let name = name.to_ascii_lowercase();
        let mut parts = name.split(|c: char| !c.is_ascii_alphanumeric());
        parts.any(|part| words.contains(&part))
    };
    // What the Python tools write beside data.
    let about = ["dataset_infos.json", "dataset_info.json", "state.json"];
    let data = names
        .iter()
        .filter(|name| is_data(name) && !name.starts_with('.'))
        .filter(|name| !about.iter().any(|about| name.ends_with(about)));
    let mut data: Vec<String> = data.cloned().collect();
    data.sort();
    let splits = ["train", "test", "validation", "valid", "dev", "val", "eval"];
    if data.iter().any(|name| mentions(name, &splits)) {
        data.retain(|name| mentions(name, &["train"]));
    }
    let folders: BTreeSet<&str> = data
        .iter()
        .map(|name| name.rsplit_once('/').map_or("", |(folder, _)| folder))
        .collect();
    let kinds: BTreeSet<_> = data.iter().map(|name| name.rsplit_once('.')).collect();
    let kinds: BTreeSet<_> = kinds.into_iter().flatten().map(|(_, end)| end).collect();
    match (data.is_empty(), folders.len() > 1 || kinds.len() > 1) {
        (true, _) => Err(
            "expected Parquet, JSON Lines or JSON files of a training split in it, found none"
                .to_owned(),
        ),
        (_, true) => Err(format!(
            "expected one training split, found {}: download it and give a file",
            data.join(", ")
        )),
        _ => Ok(data),
    }
}

/// The weight files that the index among `files` names.
pub(super) fn shards(snapshot: &Path, files: &[String]) -> Result<Vec<String>, String> {
    if !files.iter().any(|name| name == INDEX) {
        return Ok(Vec::new());
    }
    let wrong = || format!("{INDEX}: expected a weight_map of files inside the repository");
    let text = fs::read_to_string(snapshot.join(INDEX)).map_err(|e| format!("{INDEX}: {e}"))?;
    let index: Value = serde_json::from_str(&text).map_err(|e| format!("{INDEX}: {e}"))?;
    let map = index["weight_map"].as_object().ok_or_else(wrong)?;
    let names = map.values().map(|name| {
        let name = name.as_str().filter(|name| is_inside(Path::new(name)));
        name.map(str::to_owned).ok_or_else(wrong)
    });
    let names: BTreeSet<String> = names.collect::<Result<_, _>>()?;
    Ok(names.into_iter().collect())
}

/// The names of all files below a folder.
pub(super) fn below(root: &Path) -> Vec<String> {
    let (mut folders, mut names) = (vec![root.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for path in entries.map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(name) = path.strip_prefix(root)
                && path.is_file()
            {
                // Names in a repository have `/` on every system.
                let parts: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
                names.push(parts.join("/"));
            }
        }
    }
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted_of(want: Want, names: &[&str]) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        wanted(want, &names)
    }

    #[test]
    fn of_a_model_what_the_engine_reads_is_fetched_and_nothing_else() {
        let names = [
            "README.md",
            "config.json",
            "model.safetensors",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "tokenizer.json",
            INDEX,
        ];
        let files = wanted_of(Want::Model, &names).unwrap();
        assert_eq!(
            files,
            ["config.json", "model.safetensors", "tokenizer.json"]
        );
        let files = wanted_of(Want::Model, &["config.json", INDEX]).unwrap();
        assert_eq!(files, ["config.json", INDEX]);
        let error = wanted_of(Want::Model, &["config.json", "pytorch_model.bin"]).unwrap_err();
        assert!(error.contains(SINGLE), "{error}");
    }

    #[test]
    fn shards_outside_the_repository_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let index = |shard: &str| {
            let text = serde_json::json!({ "weight_map": { "a": shard, "b": shard } });
            fs::write(dir.path().join(INDEX), text.to_string()).unwrap();
            shards(dir.path(), &[INDEX.to_owned()])
        };
        assert_eq!(index("a.safetensors").unwrap(), ["a.safetensors"]);
        for shard in ["../a.safetensors", "/a.safetensors", ""] {
            assert!(index(shard).is_err(), "{shard}");
        }
    }

    #[test]
    fn saes_of_the_layer_asked_for_or_of_all_are_fetched() {
        let names = [
            "README.md",
            "layers.1/cfg.json",
            "layers.1/sae.safetensors",
            "layers.12/cfg.json",
            "layers.12/sae.safetensors",
            "layers.1.mlp/cfg.json",
        ];
        let files = wanted_of(Want::Sae(Some(1)), &names).unwrap();
        assert_eq!(files, ["layers.1/cfg.json", "layers.1/sae.safetensors"]);
        assert_eq!(wanted_of(Want::Sae(None), &names).unwrap().len(), 4);
        assert!(wanted_of(Want::Sae(Some(2)), &names).is_err());
        let top = ["cfg.json", "sae.safetensors"];
        assert_eq!(wanted_of(Want::Sae(Some(2)), &top).unwrap(), top);
    }

    #[test]
    fn of_data_the_training_split_is_fetched_in_order() {
        let names = [
            "README.md",
            "data/test-00000-of-00001.parquet",
            "data/train-00001-of-00002.parquet",
            "data/train-00000-of-00002.parquet",
            "dataset_infos.json",
        ];
        let files = wanted_of(Want::Data, &names).unwrap();
        let train = [
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
        ];
        assert_eq!(files, train);
        assert_eq!(
            wanted_of(Want::Data, &["problems.json"]).unwrap(),
            ["problems.json"]
        );
        // A name that has the letters of a split in a longer word has no split.
        assert_eq!(
            wanted_of(Want::Data, &["training.jsonl"]).unwrap(),
            ["training.jsonl"]
        );
        let two = ["main/train.parquet", "other/train.parquet"];
        let error = wanted_of(Want::Data, &two).unwrap_err();
        assert!(error.contains(two[0]) && error.contains(two[1]), "{error}");
        assert!(wanted_of(Want::Data, &["test.jsonl"]).is_err());
        assert!(wanted_of(Want::Data, &["README.md"]).is_err());
    }
}
