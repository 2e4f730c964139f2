//! A model of random weights, to measure speed and memory at a real model's size:
//! `cargo run --release --example random_model -- SHAPE OUT`, with one of the shapes that
//! `bench-kernels` knows and a folder. Its tokenizer is that of the embedded example, whose few
//! hundred tokens every shape has.

use std::path::Path;

use resa_engine::bench::shapes;
use resa_engine::formats::huggingface;
use resa_engine::train::example;
use resa_engine::{Error, Result};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, out] = &args[..] else {
        return Err(Error::setting("arguments", "expected SHAPE OUT"));
    };
    let shape = shapes::models()
        .into_iter()
        .find(|shape| shape.name == name);
    let shape = shape.ok_or_else(|| {
        let known = shapes::NAMES.join(", ");
        Error::setting("SHAPE", format!("expected one of {known}, found {name:?}"))
    })?;
    let out = Path::new(out);
    huggingface::save_random(out, &shape.config, 1)?;
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let sources = example::unpack(scratch.path())?;
    huggingface::copy_tokenizer(&sources.target, out)
}
