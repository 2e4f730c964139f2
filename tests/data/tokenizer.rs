use std::path::Path;

use resa_engine::data::Tokenizer;
use resa_engine::formats::huggingface;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{TOKENIZERS, fixture, json, strings};

/// Names and contents of JSON files.
type Files<'a> = &'a [(&'a str, Value)];

/// A model folder with the byte-level tokenizer and the given other files.
fn folder(files: Files) -> TempDir {
    let dir = TempDir::new().unwrap();
    let source = fixture("byte_level").join("tokenizer.json");
    std::fs::copy(source, dir.path().join("tokenizer.json")).unwrap();
    for (name, value) in files {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    }
    dir
}

fn error(dir: &Path) -> String {
    Tokenizer::from_dir(dir).unwrap_err().to_string()
}

#[test]
fn ids_and_decoded_texts_equal_transformers() {
    let texts = strings(&json("texts.json"));
    for name in TOKENIZERS {
        let tokenizer = Tokenizer::from_dir(fixture(name)).unwrap();
        let expected = json(&format!("{name}/expected.json"));
        for (i, text) in texts.iter().enumerate() {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(json!(ids), expected["ids"][i], "{name}: {text:?}");
            let special = tokenizer.encode(text, true).unwrap();
            assert_eq!(
                json!(special),
                expected["ids_special"][i],
                "{name}: {text:?}"
            );
            let decoded = tokenizer.decode(&ids, true).unwrap();
            assert_eq!(decoded, expected["decoded"][i], "{name}: {text:?}");
        }
        assert_eq!(json!(tokenizer.eos_id()), expected["eos_id"], "{name}");
        assert_eq!(json!(tokenizer.bos()), expected["bos_id"], "{name}");
        assert_eq!(json!(tokenizer.vocab_size()), expected["length"], "{name}");
        assert_eq!(tokenizer.eos_token(), "<eos>");
    }
}

#[test]
fn the_eos_token_comes_from_the_tokenizer_config_else_from_the_model_config() {
    let pad = json!({"eos_token": "<pad>"});
    let by_id = json!({"eos_token_id": [1, 0]});
    let table: [(Files, &str); 5] = [
        (
            &[
                ("tokenizer_config.json", json!({"eos_token": "<eos>"})),
                ("config.json", by_id.clone()),
            ],
            "<eos>",
        ),
        (
            &[(
                "tokenizer_config.json",
                json!({"eos_token": {"content": "<pad>"}}),
            )],
            "<pad>",
        ),
        (
            &[
                ("tokenizer_config.json", pad),
                ("generation_config.json", json!({"eos_token_id": 0})),
            ],
            "<pad>",
        ),
        (&[("config.json", by_id)], "<pad>"),
        (
            &[
                ("tokenizer_config.json", json!({"eos_token": null})),
                ("config.json", json!({"eos_token_id": null})),
                ("generation_config.json", json!({"eos_token_id": 1})),
            ],
            "<pad>",
        ),
    ];
    for (files, eos) in table {
        let dir = folder(files);
        assert_eq!(
            Tokenizer::from_dir(dir.path()).unwrap().eos_token(),
            eos,
            "{files:?}"
        );
    }
}

#[test]
fn bos_follows_the_post_processor_else_add_bos_token() {
    let with_bos = |add: Value, post_processor: Value| {
        let mut config = json!({"eos_token": "<eos>", "bos_token": "<pad>"});
        if !add.is_null() {
            config["add_bos_token"] = add;
        }
        let dir = folder(&[("tokenizer_config.json", config)]);
        let path = dir.path().join("tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        file["post_processor"] = post_processor;
        std::fs::write(&path, file.to_string()).unwrap();
        Tokenizer::from_dir(dir.path()).unwrap()
    };
    let bos_first = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<pad>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [1], "tokens": ["<pad>"]}},
    });
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    for (add, post_processor, bos) in [
        (Value::Null, Value::Null, None),
        (json!(false), Value::Null, None),
        (json!(true), Value::Null, Some(1)),
        (Value::Null, bos_first.clone(), Some(1)),
        (json!(false), bos_first, Some(1)),
        (json!(true), byte_level, None),
    ] {
        let tokenizer = with_bos(add, post_processor);
        assert_eq!(tokenizer.bos(), bos);
        let plain = tokenizer.encode("a b", false).unwrap();
        let around = tokenizer.encode("a b", true).unwrap();
        assert_eq!(around, bos.into_iter().chain(plain).collect::<Vec<_>>());
    }
}

#[test]
fn special_tokens_that_only_the_config_knows_are_added() {
    let config = json!({"eos_token": "<eos>", "additional_special_tokens": ["<new>"]});
    let dir = folder(&[("tokenizer_config.json", config)]);
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let before = Tokenizer::from_dir(fixture("byte_level"))
        .unwrap()
        .vocab_size();
    assert_eq!(tokenizer.vocab_size(), before + 1);
    assert_eq!(tokenizer.encode("<new>", false).unwrap(), [before as u32]);
}

#[test]
fn a_bad_folder_is_refused_with_file_and_key() {
    let table: [(Files, &[&str]); 10] = [
        (&[], &["eos_token", "eos_token_id", "config.json"]),
        (
            &[("tokenizer_config.json", json!([]))],
            &["tokenizer_config.json", "object"],
        ),
        (
            &[("tokenizer_config.json", json!({"eos_token": 3}))],
            &["tokenizer_config.json", "eos_token"],
        ),
        (
            &[("tokenizer_config.json", json!({"eos_token": ""}))],
            &["tokenizer_config.json", "eos_token"],
        ),
        (
            &[(
                "tokenizer_config.json",
                json!({"eos_token": "<eos>", "add_bos_token": "yes"}),
            )],
            &["tokenizer_config.json", "add_bos_token"],
        ),
        (
            &[(
                "tokenizer_config.json",
                json!({"eos_token": "<eos>", "add_bos_token": true}),
            )],
            &["tokenizer_config.json", "bos_token"],
        ),
        (
            &[("config.json", json!({"eos_token_id": 4096}))],
            &["config.json", "eos_token_id"],
        ),
        (
            &[("config.json", json!({"eos_token_id": -1}))],
            &["config.json", "eos_token_id"],
        ),
        (
            &[("config.json", json!({"eos_token_id": "x"}))],
            &["config.json", "eos_token_id"],
        ),
        (
            &[("config.json", json!({"eos_token_id": []}))],
            &["config.json", "eos_token_id"],
        ),
    ];
    for (files, words) in table {
        let message = error(folder(files).path());
        for word in words {
            assert!(message.contains(word), "{files:?}: {message}");
        }
    }
    let dir = folder(&[]);
    std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
    assert!(error(dir.path()).contains("tokenizer_config.json"));
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(error(dir.path()).contains("tokenizer.json"));
    assert!(error(&dir.path().join("none")).contains("tokenizer.json"));
}

#[test]
fn the_files_of_a_tokenizer_are_copied() {
    let source = folder(&[
        ("tokenizer_config.json", json!({"eos_token": "<eos>"})),
        ("config.json", json!({})),
    ]);
    std::fs::write(source.path().join("chat_template.jinja"), "x").unwrap();
    let target = TempDir::new().unwrap();
    huggingface::copy_tokenizer(source.path(), target.path()).unwrap();
    let mut names: Vec<_> = std::fs::read_dir(target.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    assert!(Tokenizer::from_dir(target.path()).is_ok());
    let file = source.path().join("config.json");
    assert!(huggingface::copy_tokenizer(source.path(), file).is_err());
}
