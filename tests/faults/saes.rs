//! Damaged sparse autoencoders.

use std::fs;

use resa_engine::formats::sparsify;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::fixture::{Fixture, Tensors, edit_bytes, edit_tensors, set, unset};
use crate::{Row, check};

fn load(fixture: &Fixture) -> resa_engine::Result<()> {
    sparsify::load(&fixture.sae()).map(drop)
}

fn config(fixture: &Fixture, key: &str, value: Value) {
    set(&fixture.sae().join("cfg.json"), key, value);
}

fn tensors(fixture: &Fixture, edit: impl FnOnce(&mut Tensors)) {
    edit_tensors(&fixture.sae().join("sae.safetensors"), edit);
}

#[test]
fn unsupported_autoencoders_are_errors_that_name_the_key() {
    /// (key, value it is set to, what the error must show beside the key)
    const KEYS: [(&str, &str, &str); 14] = [
        ("activation", r#""groupmax""#, "groupmax"),
        ("skip_connection", "true", "true"),
        ("transcode", "true", "true"),
        ("signed", "true", "true"),
        ("k", "25", "25"),
        ("k", "0", "0"),
        ("k", "-1", "-1"),
        ("k", "null", "nothing"),
        ("d_in", "null", "nothing"),
        ("d_in", "18446744073709551615", "18446744073709551615"),
        ("num_latents", "-1", "-1"),
        ("num_latents", r#""24""#, r#""24""#),
        ("expansion_factor", "1.5", "1.5"),
        ("normalize_decoder", r#""no""#, r#""no""#),
    ];
    for (key, value, shown) in KEYS {
        let fixture = Fixture::new();
        config(&fixture, key, serde_json::from_str(value).unwrap());
        let text = load(&fixture).unwrap_err().to_string();
        for says in ["cfg.json", key, shown] {
            assert!(
                text.contains(says),
                "{key} = {value}: no {says:?} in: {text}"
            );
        }
    }
}

#[test]
fn damaged_autoencoders_are_errors_that_name_file_and_tensor() {
    check(
        &[
            Row {
                what: "another number of latents than the tensors have",
                damage: |f| config(f, "num_latents", json!(32)),
                says: &["sae.safetensors", "encoder.weight", "[32, 8]", "[24, 8]"],
            },
            Row {
                what: "an expansion factor that does not give the tensors' latents",
                damage: |f| {
                    config(f, "num_latents", json!(0));
                    config(f, "expansion_factor", json!(4));
                },
                says: &["sae.safetensors", "encoder.weight", "[32, 8]", "[24, 8]"],
            },
            Row {
                what: "a transposed decoder",
                damage: |f| tensors(f, |t| t.get_mut("W_dec").unwrap().1.reverse()),
                says: &["sae.safetensors", "W_dec", "[24, 8]", "[8, 24]"],
            },
            Row {
                what: "a missing bias",
                damage: |f| tensors(f, |t| drop(t.remove("b_dec").unwrap())),
                says: &["sae.safetensors", "b_dec", "missing"],
            },
            Row {
                what: "the weights of a skip connection",
                damage: |f| {
                    tensors(f, |t| {
                        t.insert("W_skip".into(), (Dtype::F32, vec![0], vec![]));
                    });
                },
                says: &["sae.safetensors", "W_skip"],
            },
            Row {
                what: "NaN",
                damage: |f| {
                    tensors(f, |t| {
                        t.get_mut("W_dec").unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                    });
                },
                says: &["sae.safetensors", "W_dec", "NaN"],
            },
            Row {
                what: "doubles",
                damage: |f| {
                    tensors(f, |t| {
                        *t.get_mut("b_dec").unwrap() = (Dtype::F64, vec![8], vec![0; 64]);
                    });
                },
                says: &["sae.safetensors", "b_dec", "F64"],
            },
            Row {
                what: "truncated weights",
                damage: |f| {
                    edit_bytes(&f.sae().join("sae.safetensors"), |b| {
                        b.truncate(b.len() - 1)
                    });
                },
                says: &["sae.safetensors"],
            },
            Row {
                what: "empty weights",
                damage: |f| fs::write(f.sae().join("sae.safetensors"), "").unwrap(),
                says: &["sae.safetensors", "empty"],
            },
            Row {
                what: "no weights",
                damage: |f| fs::remove_file(f.sae().join("sae.safetensors")).unwrap(),
                says: &["sae.safetensors"],
            },
            Row {
                what: "a configuration that is no JSON",
                damage: |f| fs::write(f.sae().join("cfg.json"), "{\"k\": 4,").unwrap(),
                says: &["cfg.json", "JSON"],
            },
            Row {
                what: "a configuration without k",
                damage: |f| unset(&f.sae().join("cfg.json"), "k"),
                says: &["cfg.json", "key k", "nothing"],
            },
            Row {
                what: "no configuration",
                damage: |f| fs::remove_file(f.sae().join("cfg.json")).unwrap(),
                says: &["cfg.json"],
            },
        ],
        load,
    );
}

#[test]
fn a_root_without_the_layer_is_an_error_that_names_it() {
    let fixture = Fixture::new();
    let text = sparsify::hookpoint_dir(&fixture.model(), 12)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("layers.12") && text.contains("cfg.json"),
        "{text}"
    );
}

#[test]
fn an_autoencoder_that_cannot_be_written_leaves_the_old_one() {
    let fixture = Fixture::new();
    let files = ["cfg.json", "sae.safetensors"].map(|name| fixture.sae().join(name));
    let before = files.each_ref().map(|path| fs::read(path).unwrap());
    let mut sae = sparsify::load(&fixture.sae()).unwrap();
    sae.w_dec = sae.w_dec.reshape([8, 24]).unwrap();
    let text = sparsify::save(&fixture.sae(), &sae)
        .unwrap_err()
        .to_string();
    assert!(text.contains("W_dec"), "{text}");
    assert_eq!(files.each_ref().map(|path| fs::read(path).unwrap()), before);
    assert_eq!(fs::read_dir(fixture.sae()).unwrap().count(), 2);
}
