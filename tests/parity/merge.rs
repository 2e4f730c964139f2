//! Merged weights against float64, in memory and as they are stored.

use std::collections::BTreeSet;
use std::path::Path;
use std::slice::from_ref;

use half::bf16;
use resa_engine::formats::huggingface;
use resa_engine::model::{Lora, Module};
use serde_json::json;
use tempfile::TempDir;

use super::formats::{
    Tensors, altered_model, golden, golden_lora, json_of, named, reference, to_bf16, values,
};

/// W + s B A in float64 for one adapted matrix.
fn merged_f64(weight: &[f32], lora: &Lora, place: (usize, Module)) -> Vec<f64> {
    let pair = &lora.pairs[&place];
    let (a, b) = (values(&pair.a), values(&pair.b));
    let r = lora.config.r;
    let cols = a.len() / r;
    let element = |(i, &w): (usize, &f32)| {
        let (row, col) = (i / cols, i % cols);
        let sum: f64 = (0..r)
            .map(|j| f64::from(b[row * r + j]) * f64::from(a[j * cols + col]))
            .sum();
        f64::from(w) + f64::from(lora.config.scale()) * sum
    };
    weight.iter().enumerate().map(element).collect()
}

/// Merges the golden adapter into a model folder and checks every matrix against float64:
/// relative to the matrix's largest entry, f32 sums may differ by 1e-6; what is stored may
/// differ by that and half a unit of the storage's last place.
fn check_merged(model_dir: &Path, half_unit: f64) -> TempDir {
    let lora = golden_lora();
    let mut in_memory = huggingface::load(model_dir).unwrap();
    let before = named(&in_memory);
    let parent = tempfile::tempdir().unwrap();
    let out = parent.path().join("new/merged");
    huggingface::save_merged(model_dir, from_ref(&lora), &out).unwrap();
    huggingface::merge_into(&mut in_memory, &lora).unwrap();
    let (on_disk, in_memory) = (named(&huggingface::load(&out).unwrap()), named(&in_memory));
    let mut adapted = BTreeSet::new();
    for &(layer, module) in lora.pairs.keys() {
        let name = format!("model.layers.{layer}.{}.weight", module.path());
        let exact = merged_f64(&values(&before[&name]), &lora, (layer, module));
        let largest = exact.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let pairs = values(&in_memory[&name])
            .into_iter()
            .zip(values(&on_disk[&name]));
        for ((memory, disk), &exact) in pairs.zip(&exact) {
            let summed = 1e-6 * largest;
            assert!(
                (f64::from(memory) - exact).abs() <= summed,
                "{name}: {memory} {exact}"
            );
            let stored = summed + half_unit * exact.abs();
            assert!(
                (f64::from(disk) - exact).abs() <= stored,
                "{name}: {disk} {exact}"
            );
        }
        assert_eq!(on_disk[&name].dtype(), before[&name].dtype());
        adapted.insert(name);
    }
    for (name, tensor) in &before {
        if !adapted.contains(name) {
            assert_eq!(values(&on_disk[name]), values(tensor), "{name}");
        }
    }
    parent
}

#[test]
fn merged_weights_agree_with_float64() {
    // f32 as stored is f32 as summed.
    check_merged(&golden("model"), 0.0);
}

#[test]
fn merged_bf16_weights_are_rounded_once() {
    let model = altered_model(to_bf16, &[]);
    // 8 bits of significand: half a unit is 2^-9 of the next power of two, 2^-8 of the value at most.
    let parent = check_merged(model.path(), 2f64.powi(-8));
    let out = parent.path().join("new/merged");
    assert_eq!(
        json_of(&out.join("config.json")),
        json_of(&model.path().join("config.json"))
    );
    // Rounding once means to the nearest: the f32 sums, rounded by the half crate.
    let mut in_memory = huggingface::load(model.path()).unwrap();
    huggingface::merge_into(&mut in_memory, &golden_lora()).unwrap();
    let on_disk = named(&huggingface::load(&out).unwrap());
    for (name, tensor) in named(&in_memory) {
        let rounded: Vec<f32> = values(&tensor)
            .iter()
            .map(|&v| bf16::from_f32(v).to_f32())
            .collect();
        assert_eq!(values(&on_disk[&name]), rounded, "{name}");
    }
}

#[test]
fn a_tied_head_is_the_embedding_and_is_not_stored_twice() {
    let without_head = |t: &mut Tensors| drop(t.remove("lm_head.weight").unwrap());
    let model = altered_model(without_head, &[("tie_word_embeddings", json!(true))]);
    let loaded = huggingface::load(model.path()).unwrap();
    assert_eq!(values(&loaded.lm_head), values(&loaded.embed_tokens));
    let parent = check_merged(model.path(), 0.0);
    let stored = reference(&parent.path().join("new/merged/model.safetensors"));
    assert!(!stored.contains_key("lm_head.weight"));
}
