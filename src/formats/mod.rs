//! Files of other tools: safetensors, Hugging Face models, PEFT adapters, sparsify SAEs, and the
//! hub they come from.
//!
//! Every file may be damaged or hostile: sizes, offsets, shapes and dtypes are checked before
//! use, and an error names the file, the tensor or key, what was expected and what was found.

pub mod atomic;
pub mod hub;
pub mod huggingface;
pub(crate) mod json;
pub mod lock;
pub mod peft;
pub mod safetensors;
pub mod sparsify;

use std::path::{Component, Path};

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// An error unless every element of `tensor` (a float tensor of file `path`) is finite.
fn check_finite(path: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    const CHUNK: usize = 1 << 16;
    (0..tensor.len().div_ceil(CHUNK))
        .into_par_iter()
        .map_init(Vec::new, |values, chunk| {
            let start = chunk * CHUNK;
            values.resize(CHUNK.min(tensor.len() - start), 0.0);
            tensor.read_f32(start, values)?;
            match values.iter().position(|v| !v.is_finite()) {
                None => Ok(()),
                Some(i) => Err(Error::tensor(
                    path,
                    name,
                    format!(
                        "expected finite numbers, element {} is {}",
                        start + i,
                        values[i]
                    ),
                )),
            }
        })
        .find_first(|result| result.is_err())
        .unwrap_or(Ok(()))
}

/// An error unless `tensor` of file `path` has this shape.
fn check_shape(path: &Path, name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.shape() == shape {
        return Ok(());
    }
    Err(Error::tensor(
        path,
        name,
        format!("expected shape {shape:?}, found {:?}", tensor.shape()),
    ))
}

/// Whether a relative path stays in the folder it starts from.
fn is_inside(path: &Path) -> bool {
    let mut parts = path.components().peekable();
    parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
}
