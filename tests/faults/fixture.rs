//! A tiny valid model, adapter and sparse autoencoder on disk, and ways to damage them. The
//! files are made with the reference safetensors crate and serde_json, not with the engine.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const VOCAB: usize = 16;
const HIDDEN: usize = 8;
const INTERMEDIATE: usize = 12;
const LAYERS: usize = 2;
/// 2 heads of 4, one of them for keys and values.
const KEY_VALUE: usize = 4;
const RANK: usize = 2;
const LATENTS: usize = 24;

/// (path below a layer, out features, in features) of the linear modules.
const MODULES: [(&str, usize, usize); 7] = [
    ("self_attn.q_proj", HIDDEN, HIDDEN),
    ("self_attn.k_proj", KEY_VALUE, HIDDEN),
    ("self_attn.v_proj", KEY_VALUE, HIDDEN),
    ("self_attn.o_proj", HIDDEN, HIDDEN),
    ("mlp.gate_proj", INTERMEDIATE, HIDDEN),
    ("mlp.up_proj", INTERMEDIATE, HIDDEN),
    ("mlp.down_proj", HIDDEN, INTERMEDIATE),
];

/// Named tensors: shape and values, stored as f32 unless said otherwise.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A folder with `model/`, `adapter/` and `sae/`, removed when dropped.
pub struct Fixture {
    dir: TempDir,
}

impl Fixture {
    pub fn new() -> Self {
        let fixture = Self {
            dir: TempDir::new().unwrap(),
        };
        for dir in [fixture.model(), fixture.adapter(), fixture.sae()] {
            fs::create_dir(dir).unwrap();
        }
        write_json(&fixture.model().join("config.json"), &model_config());
        write_tensors(&fixture.model().join("model.safetensors"), &model_tensors());
        write_json(
            &fixture.adapter().join("adapter_config.json"),
            &adapter_config(),
        );
        write_tensors(
            &fixture.adapter().join("adapter_model.safetensors"),
            &adapter_tensors(),
        );
        write_json(&fixture.sae().join("cfg.json"), &sae_config());
        write_tensors(&fixture.sae().join("sae.safetensors"), &sae_tensors());
        fixture
    }

    pub fn root(&self) -> &Path {
        self.dir.path()
    }

    pub fn model(&self) -> PathBuf {
        self.root().join("model")
    }

    pub fn adapter(&self) -> PathBuf {
        self.root().join("adapter")
    }

    pub fn sae(&self) -> PathBuf {
        self.root().join("sae")
    }

    /// Splits the model into two shards with an index.
    pub fn shard(&self) {
        let model = self.model();
        let whole = model.join("model.safetensors");
        let (embeddings, rest): (Tensors, Tensors) = read_tensors(&whole)
            .into_iter()
            .partition(|(name, _)| name.contains("embed") || name.contains("lm_head"));
        fs::remove_file(whole).unwrap();
        let mut weight_map = Map::new();
        for (file, tensors) in [("a.safetensors", embeddings), ("b.safetensors", rest)] {
            write_tensors(&model.join(file), &tensors);
            weight_map.extend(tensors.into_keys().map(|name| (name, json!(file))));
        }
        write_json(
            &model.join("model.safetensors.index.json"),
            &json!({"metadata": {"total_size": 0}, "weight_map": weight_map}),
        );
    }
}

fn model_config() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 64,
        "model_type": "qwen2",
        "num_attention_heads": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": null,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
        "use_sliding_window": false,
        "vocab_size": VOCAB,
    })
}

fn model_tensors() -> Tensors {
    let mut tensors = Tensors::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = f32_tensor(&name, shape);
        tensors.insert(name, values);
    };
    add("model.embed_tokens.weight".into(), &[VOCAB, HIDDEN]);
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    add("model.norm.weight".into(), &[HIDDEN]);
    for layer in 0..LAYERS {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("{prefix}.{norm}.weight"), &[HIDDEN]);
        }
        for (module, rows, cols) in MODULES {
            add(format!("{prefix}.{module}.weight"), &[rows, cols]);
            if ["q_proj", "k_proj", "v_proj"]
                .iter()
                .any(|p| module.ends_with(p))
            {
                add(format!("{prefix}.{module}.bias"), &[rows]);
            }
        }
    }
    tensors
}

fn adapter_config() -> Value {
    json!({
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": false,
        "layers_pattern": null,
        "layers_to_transform": null,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": RANK,
        "target_modules": ["q_proj", "down_proj"],
        "use_dora": false,
        "use_rslora": false,
    })
}

fn adapter_tensors() -> Tensors {
    let mut tensors = Tensors::new();
    for layer in 0..LAYERS {
        for (module, rows, cols) in [MODULES[0], MODULES[6]] {
            let prefix = format!("base_model.model.model.layers.{layer}.{module}");
            for (factor, shape) in [("lora_A", [RANK, cols]), ("lora_B", [rows, RANK])] {
                let name = format!("{prefix}.{factor}.weight");
                let values = f32_tensor(&name, &shape);
                tensors.insert(name, values);
            }
        }
    }
    tensors
}

fn sae_config() -> Value {
    json!({
        "activation": "topk", "expansion_factor": 3, "normalize_decoder": true,
        "num_latents": LATENTS, "k": 4, "multi_topk": false, "skip_connection": false,
        "transcode": false, "d_in": HIDDEN,
    })
}

fn sae_tensors() -> Tensors {
    let shapes = [
        ("encoder.weight", vec![LATENTS, HIDDEN]),
        ("encoder.bias", vec![LATENTS]),
        ("W_dec", vec![LATENTS, HIDDEN]),
        ("b_dec", vec![HIDDEN]),
    ];
    let named = shapes.map(|(name, shape)| (name.to_owned(), f32_tensor(name, &shape)));
    named.into_iter().collect()
}

/// Values between -1 and 1 that depend on the name.
fn f32_tensor(name: &str, shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    let mut state = name
        .bytes()
        .fold(1u32, |h, b| h.wrapping_mul(16_777_619) ^ u32::from(b));
    let count = shape.iter().product();
    let values = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0).to_le_bytes()
    });
    (
        Dtype::F32,
        shape.to_vec(),
        values.take(count).flatten().collect(),
    )
}

pub fn write_json(path: &Path, value: &Value) {
    fs::write(path, serde_json::to_vec_pretty(value).unwrap()).unwrap();
}

/// Changes a JSON file.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    write_json(path, &value);
}

/// Sets a key of a JSON file.
pub fn set(path: &Path, key: &str, value: Value) {
    edit_json(path, |json| json[key] = value);
}

/// Removes a key of a JSON file.
pub fn unset(path: &Path, key: &str) {
    edit_json(path, |json| {
        json.as_object_mut().unwrap().shift_remove(key).unwrap();
    });
}

pub fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        let content = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (name.to_owned(), content)
    });
    tensors.collect()
}

/// Changes the tensors of a safetensors file, which stays well-formed.
pub fn edit_tensors(path: &Path, edit: impl FnOnce(&mut Tensors)) {
    let mut tensors = read_tensors(path);
    edit(&mut tensors);
    write_tensors(path, &tensors);
}

/// Changes a file's bytes.
pub fn edit_bytes(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    edit(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes the text of a safetensors header and leaves the data as they are.
pub fn edit_header_text(path: &Path, edit: impl FnOnce(String) -> String) {
    edit_bytes(path, |bytes| {
        let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = edit(String::from_utf8(bytes[8..end].to_vec()).unwrap());
        let data = bytes.split_off(end);
        *bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.into_bytes());
        bytes.extend(data);
    });
}

/// Changes the JSON header of a safetensors file and leaves the data as they are.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    edit_header_text(path, |text| {
        let mut header = serde_json::from_str(&text).unwrap();
        edit(&mut header);
        header.to_string()
    });
}
