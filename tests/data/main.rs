//! Records, templates, tokenising, packing, the activation cache and answer comparison, against
//! what the Python tools give (`make_fixtures.py`) and against damaged input.

mod answers;
mod cache;
mod chat;
mod damage;
mod pack;
mod records;
mod template;
mod tokenizer;

use std::path::{Path, PathBuf};

use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/data/fixtures")
        .join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

/// The tokenizers in the fixtures: byte-level BPE as Qwen2 has it, BPE with byte fallback and BOS
/// as Llama has it, and one whose EOS swallows white space on both sides.
const TOKENIZERS: [&str; 3] = ["byte_level", "metaspace_bos", "strip_eos"];

fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}
