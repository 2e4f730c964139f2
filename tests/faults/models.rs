//! Damaged base models.

use std::fs;

use resa_engine::formats::huggingface;
use serde_json::{Value, json};

use crate::fixture::{
    Fixture, edit_bytes, edit_header, edit_header_text, edit_json, edit_tensors, set, unset,
};
use crate::{Row, check};

const Q: &str = "model.layers.1.self_attn.q_proj.weight";

fn load(fixture: &Fixture) -> resa_engine::Result<()> {
    huggingface::load(&fixture.model()).map(drop)
}

/// Changes the bytes of the model's weights.
fn weights(fixture: &Fixture, edit: impl FnOnce(&mut Vec<u8>)) {
    edit_bytes(&fixture.model().join("model.safetensors"), edit);
}

/// Sets a key of the model's configuration.
fn config(fixture: &Fixture, key: &str, value: Value) {
    set(&fixture.model().join("config.json"), key, value);
}

fn header(fixture: &Fixture, edit: impl FnOnce(&mut Value)) {
    edit_header(&fixture.model().join("model.safetensors"), edit);
}

fn overwrite_element(fixture: &Fixture, tensor: &str, value: f32) {
    edit_tensors(&fixture.model().join("model.safetensors"), |tensors| {
        tensors.get_mut(tensor).unwrap().2[8..12].copy_from_slice(&value.to_le_bytes());
    });
}

#[test]
fn a_weights_file_cut_anywhere_is_an_error_that_names_it() {
    let fixture = Fixture::new();
    let path = fixture.model().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let cuts = (0..64).chain((64..whole.len()).step_by(131));
    for cut in cuts.chain([whole.len() - 1]) {
        fs::write(&path, &whole[..cut]).unwrap();
        let text = load(&fixture).unwrap_err().to_string();
        assert!(text.contains("model.safetensors"), "cut at {cut}: {text}");
    }
}

#[test]
fn damaged_weights_are_errors_that_name_file_and_tensor() {
    check(
        &[
            Row {
                what: "a header length beyond the file",
                damage: |f| weights(f, |b| b[..8].copy_from_slice(&(1u64 << 20).to_le_bytes())),
                says: &["model.safetensors", "header", "1048576"],
            },
            Row {
                what: "the largest header length there is",
                damage: |f| weights(f, |b| b[..8].fill(0xff)),
                says: &["model.safetensors", "header", "18446744073709551615"],
            },
            Row {
                what: "a header that is not UTF-8",
                damage: |f| weights(f, |b| b[20] = 0xff),
                says: &["model.safetensors", "header"],
            },
            Row {
                what: "a header that is a list",
                damage: |f| header(f, |h| *h = json!([1])),
                says: &["model.safetensors", "header"],
            },
            Row {
                what: "bytes after the last tensor",
                damage: |f| weights(f, |b| b.extend([0; 4])),
                says: &["model.safetensors", "bytes of data"],
            },
            Row {
                what: "overlapping tensors",
                damage: |f| {
                    header(f, |h| {
                        let other = h["model.layers.0.self_attn.q_proj.weight"].clone();
                        h[Q]["data_offsets"] = other["data_offsets"].clone();
                    });
                },
                says: &["model.safetensors", "q_proj", "overlap"],
            },
            Row {
                what: "offsets beyond the file",
                damage: |f| header(f, |h| h[Q]["data_offsets"] = json!([0u64, u64::MAX])),
                says: &["model.safetensors", "tensor "],
            },
            Row {
                what: "offsets whose sum overflows",
                damage: |f| {
                    header(f, |h| {
                        h["zzz"] = json!({"dtype": "U8", "shape": [u64::MAX - 5248],
                            "data_offsets": [5248u64, u64::MAX]});
                    });
                },
                says: &["model.safetensors", "tensor "],
            },
            Row {
                what: "offsets in reverse",
                damage: |f| header(f, |h| h[Q]["data_offsets"] = json!([400, 0])),
                says: &["model.safetensors", "tensor "],
            },
            Row {
                what: "a negative offset",
                damage: |f| header(f, |h| h[Q]["data_offsets"] = json!([-1, 0])),
                says: &["model.safetensors", Q],
            },
            Row {
                what: "a shape whose product overflows",
                damage: |f| header(f, |h| h[Q]["shape"] = json!([1u64 << 40, 1u64 << 40])),
                says: &["model.safetensors", Q, "1099511627776"],
            },
            Row {
                what: "a shape larger than its bytes",
                damage: |f| header(f, |h| h[Q]["shape"] = json!([8, 9])),
                says: &["model.safetensors", Q, "[8, 9]"],
            },
            Row {
                what: "a dtype that does not exist",
                damage: |f| header(f, |h| h[Q]["dtype"] = json!("F31")),
                says: &["model.safetensors", Q, "F31"],
            },
            Row {
                what: "a dtype of another size",
                damage: |f| header(f, |h| h[Q]["dtype"] = json!("BF16")),
                says: &["model.safetensors", Q, "BF16"],
            },
            Row {
                what: "integers instead of floats",
                damage: |f| header(f, |h| h[Q]["dtype"] = json!("I32")),
                says: &["model.safetensors", Q, "I32"],
            },
            Row {
                what: "unsigned integers instead of floats",
                damage: |f| header(f, |h| h[Q]["dtype"] = json!("U32")),
                says: &["model.safetensors", Q, "U32"],
            },
            Row {
                what: "another shape than the configuration says",
                damage: |f| header(f, |h| h[Q]["shape"] = json!([4, 16])),
                says: &["model.safetensors", Q, "[8, 8]", "[4, 16]"],
            },
            Row {
                what: "a tensor with one dimension more",
                damage: |f| header(f, |h| h["model.norm.weight"]["shape"] = json!([1, 8])),
                says: &["model.safetensors", "model.norm.weight", "[1, 8]"],
            },
            Row {
                what: "two tensors of one name",
                damage: |f| {
                    let path = f.model().join("model.safetensors");
                    edit_header_text(&path, |text| {
                        let twin = r#"{"lm_head.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"#;
                        text.replacen('{', twin, 1)
                    });
                },
                says: &["model.safetensors", "lm_head.weight", "two"],
            },
            Row {
                what: "NaN in a matrix",
                damage: |f| overwrite_element(f, Q, f32::NAN),
                says: &["model.safetensors", Q, "element 2", "NaN"],
            },
            Row {
                what: "infinity in a norm",
                damage: |f| overwrite_element(f, "model.norm.weight", f32::INFINITY),
                says: &["model.safetensors", "model.norm.weight", "inf"],
            },
            Row {
                what: "a missing matrix",
                damage: |f| {
                    let path = f.model().join("model.safetensors");
                    edit_tensors(&path, |t| drop(t.remove(Q).unwrap()));
                },
                says: &["model.safetensors", Q, "missing"],
            },
            Row {
                what: "a missing bias",
                damage: |f| {
                    let path = f.model().join("model.safetensors");
                    edit_tensors(&path, |t| {
                        drop(t.remove("model.layers.0.self_attn.k_proj.bias").unwrap());
                    });
                },
                says: &[
                    "model.safetensors",
                    "layers.0.self_attn.k_proj.bias",
                    "missing",
                ],
            },
            Row {
                what: "biases in a llama",
                damage: |f| config(f, "model_type", json!("llama")),
                says: &["model.safetensors", "layers.0.self_attn.q_proj.bias"],
            },
            Row {
                what: "an empty weights file",
                damage: |f| weights(f, Vec::clear),
                says: &["model.safetensors", "empty"],
            },
            Row {
                what: "a folder in place of the weights",
                damage: |f| {
                    let path = f.model().join("model.safetensors");
                    fs::remove_file(&path).unwrap();
                    fs::create_dir(&path).unwrap();
                },
                says: &["model.safetensors"],
            },
            Row {
                what: "no weights",
                damage: |f| fs::remove_file(f.model().join("model.safetensors")).unwrap(),
                says: &["model.safetensors", "model.safetensors.index.json"],
            },
        ],
        load,
    );
}

#[test]
fn unsupported_configurations_are_errors_that_name_the_key() {
    /// (key, value it is set to, what the error must show beside the key)
    const KEYS: [(&str, &str, &str); 33] = [
        ("model_type", r#""mistral""#, "mistral"),
        ("model_type", "null", "nothing"),
        ("model_type", "7", "7"),
        ("hidden_size", "0", "0"),
        ("hidden_size", "-8", "-8"),
        ("hidden_size", "8.5", "8.5"),
        ("hidden_size", r#""8""#, r#""8""#),
        (
            "hidden_size",
            "18446744073709551615",
            "18446744073709551615",
        ),
        ("hidden_size", "null", "nothing"),
        ("num_hidden_layers", "200000000", "200000000"),
        ("num_attention_heads", "3", "3"),
        ("num_key_value_heads", "4", "4"),
        ("head_dim", "3", "3"),
        ("vocab_size", "[]", "[]"),
        ("rms_norm_eps", r#""small""#, "small"),
        ("rms_norm_eps", "-1", "-1"),
        ("rope_theta", "0", "0"),
        ("rope_theta", "true", "true"),
        (
            "rope_scaling",
            r#"{"type": "linear", "factor": 2.0}"#,
            "linear",
        ),
        (
            "rope_scaling",
            r#"{"rope_type": "yarn", "factor": 4.0}"#,
            "yarn",
        ),
        ("rope_scaling", r#"{"factor": 4.0}"#, "factor"),
        ("rope_scaling", r#""linear""#, "linear"),
        (
            "rope_parameters",
            r#"{"rope_type": "llama3", "rope_theta": 1e4}"#,
            "llama3",
        ),
        (
            "rope_parameters",
            r#"{"rope_type": "default", "rope_theta": -1.0}"#,
            "-1",
        ),
        (
            "rope_parameters",
            r#"{"full_attention": {"rope_theta": 1e4}}"#,
            "full_attention",
        ),
        ("use_sliding_window", "true", "true"),
        (
            "layer_types",
            r#"["full_attention", "sliding_attention"]"#,
            "sliding_attention",
        ),
        ("quantization_config", r#"{"quant_method": "gptq"}"#, "gptq"),
        ("num_experts", "8", "8"),
        ("hidden_act", r#""gelu""#, "gelu"),
        ("attention_bias", "false", "false"),
        ("pretraining_tp", "2", "2"),
        ("tie_word_embeddings", r#""yes""#, "yes"),
    ];
    for (key, value, shown) in KEYS {
        let fixture = Fixture::new();
        config(&fixture, key, serde_json::from_str(value).unwrap());
        let text = load(&fixture).unwrap_err().to_string();
        for says in ["config.json", key, shown] {
            assert!(
                text.contains(says),
                "{key} = {value}: no {says:?} in: {text}"
            );
        }
    }
}

#[test]
fn damaged_configurations_are_errors_that_name_the_file() {
    check(
        &[
            Row {
                what: "attention bias in a llama",
                damage: |f| {
                    config(f, "model_type", json!("llama"));
                    config(f, "attention_bias", json!(true));
                },
                says: &["config.json", "attention_bias", "true"],
            },
            Row {
                what: "two bases of the rotary embedding",
                damage: |f| config(f, "rope_parameters", json!({"rope_theta": 1e6})),
                says: &["config.json", "rope_theta"],
            },
            Row {
                what: "a missing key",
                damage: |f| unset(&f.model().join("config.json"), "vocab_size"),
                says: &["config.json", "vocab_size", "nothing"],
            },
            Row {
                what: "an empty configuration",
                damage: |f| fs::write(f.model().join("config.json"), "").unwrap(),
                says: &["config.json", "JSON"],
            },
            Row {
                what: "a configuration that ends early",
                damage: |f| edit_bytes(&f.model().join("config.json"), |b| b.truncate(40)),
                says: &["config.json", "JSON"],
            },
            Row {
                what: "a configuration that is a list",
                damage: |f| fs::write(f.model().join("config.json"), "[]").unwrap(),
                says: &["config.json", "object"],
            },
            Row {
                what: "a deeply nested configuration",
                damage: |f| fs::write(f.model().join("config.json"), "[".repeat(1 << 20)).unwrap(),
                says: &["config.json", "JSON"],
            },
            Row {
                what: "no configuration",
                damage: |f| fs::remove_file(f.model().join("config.json")).unwrap(),
                says: &["config.json"],
            },
            Row {
                what: "a folder in place of the configuration",
                damage: |f| {
                    fs::remove_file(f.model().join("config.json")).unwrap();
                    fs::create_dir(f.model().join("config.json")).unwrap();
                },
                says: &["config.json"],
            },
            Row {
                what: "no folder",
                damage: |f| fs::remove_dir_all(f.model()).unwrap(),
                says: &["model"],
            },
            Row {
                what: "a file in place of the folder",
                damage: |f| {
                    fs::remove_dir_all(f.model()).unwrap();
                    fs::write(f.model(), "model").unwrap();
                },
                says: &["model"],
            },
        ],
        load,
    );
}

/// Shards the model, then sets the file of a tensor in the index.
fn misplace(fixture: &Fixture, shard: Value) {
    fixture.shard();
    let index = fixture.model().join("model.safetensors.index.json");
    edit_json(&index, |json| json["weight_map"][Q] = shard);
}

#[test]
fn a_sharded_model_loads() {
    let fixture = Fixture::new();
    fixture.shard();
    load(&fixture).unwrap();
}

#[test]
fn damaged_shards_are_errors_that_name_file_and_tensor() {
    check(
        &[
            Row {
                what: "an index that points to the folder above",
                damage: |f| misplace(f, json!("../adapter/adapter_model.safetensors")),
                says: &["index.json", Q, "../adapter", "inside"],
            },
            Row {
                what: "an index with an absolute path",
                damage: |f| misplace(f, json!("/etc/passwd")),
                says: &["index.json", Q, "/etc/passwd"],
            },
            Row {
                what: "an index with an empty path",
                damage: |f| misplace(f, json!("")),
                says: &["index.json", Q],
            },
            Row {
                what: "an index with a number for a path",
                damage: |f| misplace(f, json!(3)),
                says: &["index.json", Q, "3"],
            },
            Row {
                what: "an index that points to a missing shard",
                damage: |f| misplace(f, json!("c.safetensors")),
                says: &["c.safetensors"],
            },
            Row {
                what: "an index that points to the wrong shard",
                damage: |f| misplace(f, json!("a.safetensors")),
                says: &["a.safetensors", Q, "missing"],
            },
            Row {
                what: "an index that leaves a tensor out",
                damage: |f| {
                    f.shard();
                    let index = f.model().join("model.safetensors.index.json");
                    edit_json(&index, |json| {
                        json["weight_map"].as_object_mut().unwrap().shift_remove(Q);
                    });
                },
                says: &["index.json", Q, "missing"],
            },
            Row {
                what: "an index without a map",
                damage: |f| {
                    f.shard();
                    unset(
                        &f.model().join("model.safetensors.index.json"),
                        "weight_map",
                    );
                },
                says: &["index.json", "weight_map"],
            },
            Row {
                what: "an index that is no JSON",
                damage: |f| {
                    f.shard();
                    let index = f.model().join("model.safetensors.index.json");
                    fs::write(index, "{\"weight_map\": {").unwrap();
                },
                says: &["index.json", "JSON"],
            },
            Row {
                what: "a truncated shard",
                damage: |f| {
                    f.shard();
                    edit_bytes(&f.model().join("b.safetensors"), |b| {
                        b.truncate(b.len() - 3)
                    });
                },
                says: &["b.safetensors"],
            },
        ],
        load,
    );
}
