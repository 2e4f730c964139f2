//! The golden files of tests/fixtures/golden, computed by PyTorch in float64 (make_golden.py).

use std::path::PathBuf;

use resa_engine::model::{Sae, SaeConfig};
use resa_engine::tensor::Tensor;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A file or folder among the golden ones.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/golden")
        .join(name)
}

pub fn golden(file: &str) -> Vec<u8> {
    std::fs::read(path(file)).unwrap()
}

pub fn json(file: &str) -> Value {
    serde_json::from_slice(&golden(file)).unwrap()
}

/// A float32 or int32 tensor of a file; the latter as u32.
pub fn tensor(bytes: &[u8], name: &str) -> Tensor {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let words = view.data().as_chunks::<4>().0;
    match view.dtype() {
        Dtype::F32 => {
            let data = words.iter().map(|&b| f32::from_le_bytes(b)).collect();
            Tensor::from_vec(data, view.shape()).unwrap()
        }
        Dtype::I32 => {
            let data = words.iter().map(|&b| u32::from_le_bytes(b)).collect();
            Tensor::from_u32(data, view.shape()).unwrap()
        }
        other => panic!("{name}: {other:?}"),
    }
}

pub fn golden_sae() -> Sae {
    let config = json("sae/cfg.json");
    let number = |key: &str| config[key].as_u64().unwrap() as usize;
    let bytes = golden("sae/sae.safetensors");
    let sizes = SaeConfig {
        d_in: number("d_in"),
        num_latents: number("num_latents"),
        k: number("k"),
        expansion_factor: number("expansion_factor"),
        normalize_decoder: true,
        multi_topk: false,
    };
    let tensors = Sae::TENSORS.map(|name| tensor(&bytes, name));
    Sae::new(sizes, tensors)
}

pub fn assert_close(name: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    let (got, want) = (got.f32s().unwrap(), want.f32s().unwrap());
    let pairs = got.iter().zip(want);
    let difference: f64 = pairs.map(|(g, w)| f64::from(g - w).powi(2)).sum();
    let size: f64 = want.iter().map(|&w| f64::from(w).powi(2)).sum();
    let error = (difference / size).sqrt();
    assert!(error < tolerance, "{name} is off by {error:e}");
}

/// Rows 0, 8, 16, … of a matrix.
pub fn every_eighth_row(matrix: &Tensor) -> Tensor {
    let (rows, cols) = matrix.matrix_dims();
    let data = matrix.f32s().unwrap().chunks(cols).step_by(8);
    let data = data.flatten().copied().collect();
    Tensor::from_vec(data, [rows.div_ceil(8), cols]).unwrap()
}
