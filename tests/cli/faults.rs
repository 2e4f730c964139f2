//! What cannot work is refused before anything is trained: the message names the file or the
//! option, and the folder is as it was.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::support::{Workshop, copy_dir, edit_json, fixture, stderr};

/// A way to fail, and what the message must name.
struct Row {
    what: &'static str,
    /// Puts files into the workshop.
    prepare: fn(&Workshop),
    args: &'static [&'static str],
    code: i32,
    names: &'static [&'static str],
}

const NOTHING: fn(&Workshop) = |_| {};

/// What only reading all weights shows.
const NO_NUMBERS: &str = "weights that are no numbers";

const ROWS: &[Row] = &[
    Row {
        what: "data without answers",
        prepare: |w| fs::write(w.path("bad.jsonl"), "{\"problem\": \"1 + 1?\"}\n").unwrap(),
        args: &["--data", "bad.jsonl"],
        code: 1,
        names: &["bad.jsonl", "line 1", "answer"],
    },
    Row {
        what: "an empty data file",
        prepare: |w| fs::write(w.path("bad.jsonl"), "").unwrap(),
        args: &["--data", "bad.jsonl"],
        code: 1,
        names: &["bad.jsonl", "no records"],
    },
    Row {
        what: "no data file",
        prepare: NOTHING,
        args: &["--data", "absent.jsonl"],
        code: 1,
        names: &["absent.jsonl"],
    },
    Row {
        what: "elicitation data without answers",
        prepare: |w| fs::write(w.path("bad.jsonl"), "{\"problem\": \"1 + 1?\"}\n").unwrap(),
        args: &["--elicitation-data", "bad.jsonl"],
        code: 1,
        names: &["bad.jsonl", "line 1", "answer"],
    },
    Row {
        what: "sequences longer than the data",
        prepare: NOTHING,
        args: &["--seq-len", "100000"],
        code: 1,
        names: &["--seq-len", "100000"],
    },
    Row {
        what: "a template that is no Jinja",
        prepare: |w| fs::write(w.path("bad.jinja"), "{% if %}").unwrap(),
        args: &["--template", "bad.jinja"],
        code: 1,
        names: &["bad.jinja"],
    },
    Row {
        what: "no model folder",
        prepare: NOTHING,
        args: &["--target", "absent"],
        code: 1,
        names: &["absent"],
    },
    Row {
        what: "no weights in the model folder",
        prepare: |w| {
            copy_dir(&fixture("example/target"), &w.path("model"));
            fs::remove_file(w.path("model/model.safetensors")).unwrap();
        },
        args: &["--target", "model"],
        code: 1,
        names: &["model", "model.safetensors"],
    },
    Row {
        what: "no weights in the folder of the source",
        prepare: |w| {
            copy_dir(&fixture("example/source"), &w.path("model"));
            fs::remove_file(w.path("model/model.safetensors")).unwrap();
        },
        args: &["--source", "model"],
        code: 1,
        names: &["model", "model.safetensors"],
    },
    Row {
        what: "a vocabulary too small for the tokenizer",
        prepare: |w| {
            copy_dir(&fixture("golden/model"), &w.path("model"));
            for name in ["tokenizer.json", "tokenizer_config.json"] {
                fs::copy(
                    fixture("example/target").join(name),
                    w.path("model").join(name),
                )
                .unwrap();
            }
            // The model knows 512 tokens.
            let path = w.path("model/tokenizer.json");
            edit_json(&path, |json| {
                let vocab = json["model"]["vocab"].as_object_mut().unwrap();
                vocab.insert("=".to_owned(), json!(700));
                vocab.insert("?".to_owned(), json!(701));
            });
        },
        args: &["--target", "model"],
        code: 1,
        names: &["model/tokenizer.json", "vocab_size 512"],
    },
    Row {
        what: NO_NUMBERS,
        prepare: |w| {
            copy_dir(&fixture("example/target"), &w.path("model"));
            poison(
                &w.path("model/model.safetensors"),
                "model.layers.5.mlp.up_proj.weight",
            );
        },
        args: &["--target", "model"],
        code: 1,
        names: &["model.safetensors", "model.layers.5.mlp.up_proj.weight"],
    },
    Row {
        what: "a source of another hidden size",
        prepare: |w| copy_dir(&fixture("golden/model"), &w.path("model")),
        args: &["--source", "model"],
        code: 1,
        names: &["--source", "96", "64"],
    },
    Row {
        what: "a hookpoint that the source does not have",
        prepare: |w| copy_dir(&fixture("golden/model"), &w.path("model")),
        args: &["--stage", "sae", "--source", "model", "--layer", "4"],
        code: 1,
        names: &["--hookpoint", "4 layers"],
    },
    Row {
        what: "a hookpoint that the target does not have",
        prepare: NOTHING,
        args: &["--layer", "6"],
        code: 1,
        names: &["--hookpoint", "6 layers"],
    },
    Row {
        what: "a hookpoint with no layer after it",
        prepare: NOTHING,
        args: &["--layer", "5"],
        code: 1,
        names: &["--hookpoint", "layer 5"],
    },
    Row {
        what: "an SAE of another size, to use",
        prepare: NOTHING,
        args: &["--stage", "sft", "--sae", "GOLDEN/sae"],
        code: 1,
        names: &["cfg.json", "d_in 96", "64"],
    },
    Row {
        what: "an SAE of another size, to train further",
        prepare: NOTHING,
        args: &["--sae-init", "finetune", "--sae", "GOLDEN/sae"],
        code: 1,
        names: &["cfg.json", "d_in 96", "64"],
    },
    Row {
        what: "no SAE in the folder",
        prepare: NOTHING,
        args: &["--stage", "sft", "--sae", "GOLDEN"],
        code: 1,
        names: &["golden", "cfg.json"],
    },
    Row {
        what: "an adapter of another shape",
        prepare: NOTHING,
        args: &["--adapter", "GOLDEN/lora"],
        code: 1,
        names: &["adapter_model.safetensors", "q_proj"],
    },
    Row {
        what: "a source adapter of another shape",
        prepare: NOTHING,
        args: &["--source-adapter", "GOLDEN/lora"],
        code: 1,
        names: &["adapter_model.safetensors", "q_proj"],
    },
    Row {
        what: "an adapter without a layer that is trained",
        prepare: |w| {
            w.train(
                "before",
                &[
                    "--method",
                    "sft",
                    "--max-sft-steps",
                    "1",
                    "--lora-targets",
                    "q_proj",
                ],
            );
            let file = w.path("before/adapter/adapter_config.json");
            edit_json(&file, |json| json["layers_to_transform"] = json!([0, 1]));
            let file = w.path("before/adapter/adapter_model.safetensors");
            keep_tensors(&file, |name| {
                name.contains("layers.0.") || name.contains("layers.1.")
            });
        },
        args: &["--adapter", "before/adapter"],
        code: 1,
        names: &["--adapter"],
    },
    Row {
        what: "more active latents than latents",
        prepare: NOTHING,
        args: &["--k", "193"],
        code: 2,
        names: &["--k", "192", "193"],
    },
    Row {
        what: "Stage II alone without an SAE",
        prepare: NOTHING,
        args: &["--stage", "sft"],
        code: 2,
        names: &["--sae"],
    },
    Row {
        what: "Stage I alone with an SAE that is used as it is",
        prepare: NOTHING,
        args: &[
            "--stage",
            "sae",
            "--sae-init",
            "pretrained",
            "--sae",
            "GOLDEN/sae",
        ],
        code: 2,
        names: &["--sae-init"],
    },
    Row {
        what: "a key that no setting has",
        prepare: |w| fs::write(w.path("run.toml"), "latent = 64\n").unwrap(),
        args: &["--config", "run.toml"],
        code: 2,
        names: &["run.toml", "line 1", "latent"],
    },
    Row {
        what: "a device that this machine does not have",
        prepare: NOTHING,
        args: &["--device", "cuda:99"],
        code: 1,
        names: &["--device"],
    },
];

/// What a row's run does wrong, `more` given too.
fn wrongs(row: &Row, more: &[&str]) -> Option<String> {
    let golden = fixture("golden");
    let workshop = Workshop::new(22);
    (row.prepare)(&workshop);
    let args: Vec<_> = row
        .args
        .iter()
        .map(|a| a.replace("GOLDEN", golden.to_str().unwrap()))
        .collect();
    let args: Vec<_> = args.iter().map(String::as_str).collect();
    let before = workshop.names();
    let output = workshop.resa(&workshop.train_args("run", &[&args, more].concat()));
    let text = stderr(&output);
    let error = text.lines().last().unwrap_or_default();
    let mut wrong = Vec::new();
    if output.status.code() != Some(row.code) {
        wrong.push(format!(
            "exit code {:?}, not {}",
            output.status.code(),
            row.code
        ));
    }
    if !error.starts_with("error: ") {
        wrong.push("the last line is no error".to_owned());
    }
    let missing = row.names.iter().filter(|name| !error.contains(**name));
    wrong.extend(missing.map(|name| format!("{name:?} is not named")));
    if workshop.names() != before {
        wrong.push(format!("{before:?} became {:?}", workshop.names()));
    }
    if text.contains("fvu") || text.contains("grad_norm") {
        wrong.push("something was trained".to_owned());
    }
    let all = wrong.join(", ");
    (!wrong.is_empty()).then(|| format!("{} {more:?}: {all}: {error}", row.what))
}

#[test]
fn what_cannot_work_is_refused_before_training_and_leaves_nothing_behind() {
    let failures: Vec<_> = ROWS.iter().filter_map(|row| wrongs(row, &[])).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn what_cannot_work_is_refused_by_a_dry_run_too() {
    let rows = ROWS.iter().filter(|row| row.what != NO_NUMBERS);
    let failures: Vec<_> = rows.filter_map(|row| wrongs(row, &["--dry-run"])).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let workshop = Workshop::new(22);
    let data = fs::read(workshop.path("data.jsonl")).unwrap();
    for out in ["data.jsonl", "data.jsonl/run"] {
        let output = workshop.resa(&workshop.train_args(out, &[]));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(out), "{}", stderr(&output));
    }
    assert_eq!(workshop.names(), ["data.jsonl"]);
    assert_eq!(fs::read(workshop.path("data.jsonl")).unwrap(), data);
}

#[test]
fn an_existing_empty_folder_stays_when_the_run_fails() {
    let workshop = Workshop::new(22);
    fs::create_dir(workshop.path("run")).unwrap();
    let output = workshop.resa(&workshop.train_args("run", &["--data", "absent.jsonl"]));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(fs::read_dir(workshop.path("run")).unwrap().count(), 0);
    workshop.train("run", &["--stage", "sae"]);
}

/// Writes NaN over the first numbers of a bf16 tensor.
fn poison(path: &Path, tensor: &str) {
    let mut bytes = fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let start = json[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[8 + header + start..][..4].fill(0xff);
    fs::write(path, bytes).unwrap();
}

fn keep_tensors(path: &Path, keep: fn(&str) -> bool) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let kept = file.iter().filter(|(name, _)| keep(name));
    fs::write(path, safetensors::serialize(kept, None).unwrap()).unwrap();
}
