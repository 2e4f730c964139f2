//! Damaged adapters.

use std::fs;
use std::slice::from_ref;

use resa_engine::formats::{huggingface, peft};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::fixture::{Fixture, edit_bytes, edit_header, edit_tensors, set, unset};
use crate::{Row, check};

const A: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight";

fn load(fixture: &Fixture) -> resa_engine::Result<()> {
    let model = huggingface::read_config(&fixture.model())?;
    peft::load(&fixture.adapter(), &model).map(drop)
}

fn config(fixture: &Fixture, key: &str, value: Value) {
    set(&fixture.adapter().join("adapter_config.json"), key, value);
}

#[test]
fn unsupported_adapters_are_errors_that_name_the_key() {
    /// (key, value it is set to, what the error must show beside the key)
    const KEYS: [(&str, &str, &str); 27] = [
        ("peft_type", r#""LOHA""#, "LOHA"),
        ("peft_type", "null", "nothing"),
        ("bias", r#""all""#, "all"),
        ("use_dora", "true", "true"),
        ("modules_to_save", r#"["lm_head"]"#, "lm_head"),
        ("rank_pattern", r#"{"q_proj": 8}"#, "q_proj"),
        ("alpha_pattern", r#"{"q_proj": 8}"#, "q_proj"),
        ("fan_in_fan_out", "true", "true"),
        ("lora_bias", "true", "true"),
        ("layer_replication", "[[0, 1], [0, 1]]", "[[0,1],[0,1]]"),
        ("trainable_token_indices", "[1]", "[1]"),
        ("target_parameters", r#"["w"]"#, "w"),
        ("init_lora_weights", r#""pissa_niter_4""#, "pissa"),
        ("r", "0", "0"),
        ("r", "-2", "-2"),
        ("r", r#""2""#, r#""2""#),
        ("r", "null", "nothing"),
        ("lora_alpha", r#""8""#, r#""8""#),
        ("lora_alpha", "null", "nothing"),
        ("lora_dropout", "1.5", "1.5"),
        ("use_rslora", "1", "1"),
        ("target_modules", r#"["lm_head"]"#, "lm_head"),
        ("target_modules", r#"".*_proj""#, "_proj"),
        ("target_modules", r#"["mlp.q_proj"]"#, "mlp.q_proj"),
        ("target_modules", "[]", "[]"),
        ("layers_to_transform", "[2]", "2"),
        ("layers_to_transform", r#"["1"]"#, r#""1""#),
    ];
    for (key, value, shown) in KEYS {
        let fixture = Fixture::new();
        config(&fixture, key, serde_json::from_str(value).unwrap());
        let text = load(&fixture).unwrap_err().to_string();
        for says in ["adapter_config.json", key, shown] {
            assert!(
                text.contains(says),
                "{key} = {value}: no {says:?} in: {text}"
            );
        }
    }
}

/// Changes the adapter's tensors; the file stays well-formed.
fn tensors(fixture: &Fixture, edit: impl FnOnce(&mut crate::fixture::Tensors)) {
    edit_tensors(&fixture.adapter().join("adapter_model.safetensors"), edit);
}

#[test]
fn damaged_adapters_are_errors_that_name_file_and_tensor() {
    check(
        &[
            Row {
                what: "another rank than the tensors have",
                damage: |f| config(f, "r", json!(3)),
                says: &[
                    "adapter_model.safetensors",
                    "lora_A.weight",
                    "[3, 8]",
                    "[2, 8]",
                ],
            },
            Row {
                what: "an absurd rank",
                damage: |f| config(f, "r", json!(1 << 27)),
                says: &["adapter_model.safetensors", "lora_A.weight", "134217728"],
            },
            Row {
                what: "factors of another model",
                damage: |f| {
                    tensors(f, |t| {
                        *t.get_mut(B).unwrap() = (Dtype::F32, vec![16, 2], vec![0; 128]);
                    });
                },
                says: &["adapter_model.safetensors", B, "[8, 2]", "[16, 2]"],
            },
            Row {
                what: "a missing factor",
                damage: |f| tensors(f, |t| drop(t.remove(B).unwrap())),
                says: &["adapter_model.safetensors", B, "missing"],
            },
            Row {
                what: "a tensor of no module",
                damage: |f| {
                    tensors(f, |t| {
                        t.insert(
                            "base_model.model.lm_head.weight".into(),
                            (Dtype::F32, vec![0], vec![]),
                        );
                    });
                },
                says: &[
                    "adapter_model.safetensors",
                    "base_model.model.lm_head.weight",
                ],
            },
            Row {
                what: "a module that is no target",
                damage: |f| config(f, "target_modules", json!(["q_proj"])),
                says: &["adapter_model.safetensors", "down_proj"],
            },
            Row {
                what: "a layer that is not listed",
                damage: |f| config(f, "layers_to_transform", json!([0])),
                says: &["adapter_model.safetensors", "layers.1."],
            },
            Row {
                what: "integers",
                damage: |f| {
                    let path = f.adapter().join("adapter_model.safetensors");
                    edit_header(&path, |h| h[A]["dtype"] = json!("U32"));
                },
                says: &["adapter_model.safetensors", A],
            },
            Row {
                what: "NaN",
                damage: |f| {
                    tensors(f, |t| {
                        t.get_mut(A).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                    });
                },
                says: &["adapter_model.safetensors", A, "NaN"],
            },
            Row {
                what: "truncated weights",
                damage: |f| {
                    let path = f.adapter().join("adapter_model.safetensors");
                    edit_bytes(&path, |b| b.truncate(b.len() / 2));
                },
                says: &["adapter_model.safetensors"],
            },
            Row {
                what: "empty weights",
                damage: |f| fs::write(f.adapter().join("adapter_model.safetensors"), "").unwrap(),
                says: &["adapter_model.safetensors", "empty"],
            },
            Row {
                what: "no weights",
                damage: |f| fs::remove_file(f.adapter().join("adapter_model.safetensors")).unwrap(),
                says: &["adapter_model.safetensors"],
            },
            Row {
                what: "a configuration that is no JSON",
                damage: |f| fs::write(f.adapter().join("adapter_config.json"), "r: 4").unwrap(),
                says: &["adapter_config.json", "JSON"],
            },
            Row {
                what: "a configuration without target modules",
                damage: |f| unset(&f.adapter().join("adapter_config.json"), "target_modules"),
                says: &["adapter_config.json", "target_modules", "nothing"],
            },
            Row {
                what: "no configuration",
                damage: |f| fs::remove_file(f.adapter().join("adapter_config.json")).unwrap(),
                says: &["adapter_config.json"],
            },
        ],
        load,
    );
}

#[test]
fn an_adapter_of_another_model_is_not_merged_and_changes_nothing() {
    let fixture = Fixture::new();
    let mut model = huggingface::load(&fixture.model()).unwrap();
    let mut lora = peft::load(&fixture.adapter(), &model.config).unwrap();
    let last = *lora.pairs.keys().last().unwrap();
    let pair = lora.pairs.get_mut(&last).unwrap();
    pair.a = pair.a.reshape([pair.a.len(), 1]).unwrap();
    let before = model.layers[0].q.weight.to_f32().unwrap();
    let text = huggingface::merge_into(&mut model, &lora)
        .unwrap_err()
        .to_string();
    for says in ["model.layers.1.mlp.down_proj.lora_A", "[2, 12]", "[24, 1]"] {
        assert!(text.contains(says), "no {says:?} in: {text}");
    }
    let after = model.layers[0].q.weight.to_f32().unwrap();
    assert_eq!(before.f32s().unwrap(), after.f32s().unwrap());
}

#[test]
fn a_merged_model_never_replaces_files() {
    let fixture = Fixture::new();
    let model = huggingface::read_config(&fixture.model()).unwrap();
    let lora = peft::load(&fixture.adapter(), &model).unwrap();
    let out = fixture.root().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("notes"), "mine").unwrap();
    let error = huggingface::save_merged(&fixture.model(), from_ref(&lora), &out).unwrap_err();
    assert!(error.to_string().contains("out"), "{error}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(out.join("notes")).unwrap(), "mine");
}

#[test]
fn a_merge_that_fails_leaves_nothing_behind() {
    let fixture = Fixture::new();
    let model = huggingface::read_config(&fixture.model()).unwrap();
    let lora = peft::load(&fixture.adapter(), &model).unwrap();
    // f16 tops out at 65504; the merged weights go far beyond.
    let path = fixture.model().join("model.safetensors");
    edit_tensors(&path, |tensors| {
        for (dtype, _, data) in tensors.values_mut() {
            *dtype = Dtype::F16;
            data.truncate(data.len() / 2);
            data.fill(0);
        }
    });
    let mut large = lora.clone();
    large.config.alpha = 1e9;
    let out = fixture.root().join("out");
    let text = huggingface::save_merged(&fixture.model(), from_ref(&large), &out)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("float16") && text.contains("q_proj"),
        "{text}"
    );
    let mut names: Vec<_> = fs::read_dir(fixture.root())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["adapter", "model", "sae"]);
}
