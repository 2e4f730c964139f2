//! Files written by transformers, peft and sparsify are read to the same numbers, and what is
//! written is what those tools write. The files' bytes are checked with the reference
//! safetensors crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use resa_engine::eval::Inference;
use resa_engine::formats::safetensors::{Entry, SafeTensors, write};
use resa_engine::formats::{huggingface, peft, sparsify};
use resa_engine::model::{Layout, Lora, Module, Qwen2};
use resa_engine::tensor::DType;
use resa_engine::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

pub(super) fn golden(part: &str) -> PathBuf {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden");
    fixtures.join(part)
}

pub(super) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A file's tensors as the reference implementation reads them.
pub(super) fn reference(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.iter().map(|(name, view)| {
        let content = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
        (name.to_owned(), content)
    });
    tensors.collect()
}

fn write_reference(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<4>();
    chunks.iter().map(|&b| f32::from_le_bytes(b)).collect()
}

pub(super) fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f32().unwrap().f32s().unwrap().to_vec()
}

fn golden_model() -> Qwen2 {
    huggingface::load(&golden("model")).unwrap()
}

pub(super) fn golden_lora() -> Lora {
    peft::load(&golden("lora"), &golden_model().config).unwrap()
}

/// A copy of the golden model with other tensors and other keys of the configuration.
pub(super) fn altered_model(change: impl FnOnce(&mut Tensors), keys: &[(&str, Value)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json_of(&golden("model/config.json"));
    for (key, value) in keys {
        config[key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut tensors = reference(&golden("model/model.safetensors"));
    change(&mut tensors);
    write_reference(&dir.path().join("model.safetensors"), &tensors);
    dir
}

/// Every tensor of a model under its name in the file.
pub(super) fn named(model: &Qwen2) -> BTreeMap<String, Tensor> {
    let mut all = BTreeMap::from([
        (
            "model.embed_tokens.weight".to_owned(),
            model.embed_tokens.clone(),
        ),
        ("model.norm.weight".to_owned(), model.norm.clone()),
        ("lm_head.weight".to_owned(), model.lm_head.clone()),
    ]);
    for (i, layer) in model.layers.iter().enumerate() {
        let mut add = |name: &str, tensor: &Tensor| {
            all.insert(format!("model.layers.{i}.{name}"), tensor.clone());
        };
        add("input_layernorm.weight", &layer.input_norm);
        add(
            "post_attention_layernorm.weight",
            &layer.post_attention_norm,
        );
        for module in Module::ALL {
            let linear = layer.module(module);
            add(&format!("{}.weight", module.path()), &linear.weight);
            if let Some(bias) = &linear.bias {
                add(&format!("{}.bias", module.path()), bias);
            }
        }
    }
    all
}

#[test]
fn a_model_of_transformers_is_read_whole() {
    let model = golden_model();
    let config = &model.config;
    assert_eq!(
        (
            config.vocab_size,
            config.hidden_size,
            config.intermediate_size
        ),
        (512, 64, 160)
    );
    assert_eq!(
        (
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads
        ),
        (4, 4, 2)
    );
    assert_eq!((config.head_dim, config.max_position_embeddings), (16, 128));
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10_000.0));
    assert!(config.attention_bias && !config.tie_word_embeddings);
    let file = reference(&golden("model/model.safetensors"));
    let tensors = named(&model);
    assert!(tensors.keys().eq(file.keys()));
    for (name, (_, shape, bytes)) in &file {
        assert_eq!(tensors[name].shape(), shape, "{name}");
        assert_eq!(values(&tensors[name]), f32s(bytes), "{name}");
    }
}

#[test]
fn a_llama_is_a_model_without_biases() {
    let without_biases = |tensors: &mut Tensors| tensors.retain(|name, _| !name.ends_with(".bias"));
    let keys = [
        ("model_type", json!("llama")),
        ("attention_bias", json!(false)),
    ];
    let dir = altered_model(without_biases, &keys);
    let model = huggingface::load(dir.path()).unwrap();
    assert!(!model.config.attention_bias);
    assert!(model.layers.iter().all(|layer| layer.q.bias.is_none()));
}

#[test]
fn the_rotary_base_is_found_where_either_transformers_writes_it() {
    let none = |_: &mut Tensors| {};
    let old = [
        ("rope_parameters", Value::Null),
        ("rope_theta", json!(1e6)),
        ("rope_scaling", Value::Null),
    ];
    let new = [(
        "rope_parameters",
        json!({"rope_type": "default", "rope_theta": 5e5}),
    )];
    let config = |dir: &TempDir| huggingface::read_config(dir.path()).unwrap();
    assert_eq!(config(&altered_model(none, &old)).rope_theta, 1e6);
    assert_eq!(config(&altered_model(none, &new)).rope_theta, 5e5);
}

/// Stores all tensors in half precision, rounded by the half crate.
fn narrowed(tensors: &mut Tensors, dtype: Dtype, round: fn(f32) -> [u8; 2]) {
    for (stored, _, bytes) in tensors.values_mut() {
        *bytes = f32s(bytes).into_iter().flat_map(round).collect();
        *stored = dtype;
    }
}

pub(super) fn to_bf16(tensors: &mut Tensors) {
    narrowed(tensors, Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes());
}

#[test]
fn half_precision_matrices_stay_as_stored_and_vectors_are_widened() {
    let widened_bf16 = |v: f32| bf16::from_f32(v).to_f32();
    let widened_f16 = |v: f32| f16::from_f32(v).to_f32();
    let to_f16 = |t: &mut Tensors| narrowed(t, Dtype::F16, |v| f16::from_f32(v).to_le_bytes());
    type Widened = fn(f32) -> f32;
    let cases: [(TempDir, DType, Widened); 2] = [
        (altered_model(to_bf16, &[]), DType::Bf16, widened_bf16),
        (altered_model(to_f16, &[]), DType::F16, widened_f16),
    ];
    let original = named(&golden_model());
    for (dir, dtype, widened) in cases {
        let model = huggingface::load(dir.path()).unwrap();
        assert_eq!(model.layers[0].gate.weight.dtype(), dtype);
        assert_eq!(model.layers[0].input_norm.dtype(), DType::F32);
        assert_eq!(model.layers[0].q.bias.as_ref().unwrap().dtype(), DType::F32);
        for (name, tensor) in named(&model) {
            let expected: Vec<f32> = values(&original[&name]).into_iter().map(widened).collect();
            assert_eq!(values(&tensor), expected, "{name}");
        }
    }
}

#[test]
fn an_adapter_of_peft_is_read_whole_and_written_with_the_same_tensors() {
    let lora = golden_lora();
    assert_eq!((lora.config.r, lora.config.scale()), (4, 4.0));
    assert_eq!(
        (lora.base_model.as_str(), lora.pairs.len()),
        ("../model", 28)
    );
    let original = reference(&golden("lora/adapter_model.safetensors"));
    for (&(layer, module), pair) in &lora.pairs {
        let prefix = format!("base_model.model.model.layers.{layer}.{}", module.path());
        assert_eq!(
            values(&pair.a),
            f32s(&original[&format!("{prefix}.lora_A.weight")].2)
        );
        assert_eq!(
            values(&pair.b),
            f32s(&original[&format!("{prefix}.lora_B.weight")].2)
        );
    }
    let dir = tempfile::tempdir().unwrap();
    peft::save(dir.path(), &lora).unwrap();
    assert_eq!(
        reference(&dir.path().join("adapter_model.safetensors")),
        original
    );
    let theirs = json_of(&golden("lora/adapter_config.json"));
    let ours = json_of(&dir.path().join("adapter_config.json"));
    for key in [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "bias",
        "use_dora",
        "use_rslora",
    ] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    let targets = |json: &Value| -> BTreeSet<String> {
        serde_json::from_value(json["target_modules"].clone()).unwrap()
    };
    assert_eq!(targets(&ours), targets(&theirs));
    assert_eq!(ours["layers_to_transform"], json!([0, 1, 2, 3]));
}

#[test]
fn an_adapter_of_some_layers_lists_them_and_comes_back() {
    let mut lora = golden_lora();
    lora.config.targets = vec![Module::Q, Module::Down];
    lora.config.use_rslora = true;
    lora.config.alpha = 2.5;
    lora.config.dropout = 0.1;
    let kept = lora.config.targets.clone();
    lora.pairs
        .retain(|(layer, module), _| *layer >= 2 && kept.contains(module));
    let dir = tempfile::tempdir().unwrap();
    peft::save(dir.path(), &lora).unwrap();
    let config = json_of(&dir.path().join("adapter_config.json"));
    assert_eq!(config["layers_to_transform"], json!([2, 3]));
    assert_eq!(config["layers_pattern"], json!("layers"));
    assert_eq!(config["lora_dropout"], json!(0.1));
    let back = peft::load(dir.path(), &golden_model().config).unwrap();
    assert_eq!(back.config, lora.config);
    assert!(back.pairs.keys().eq(lora.pairs.keys()));
    for (place, pair) in &lora.pairs {
        assert_eq!(values(&back.pairs[place].a), values(&pair.a));
        assert_eq!(values(&back.pairs[place].b), values(&pair.b));
    }
}

/// The golden adapter, read with other keys in its configuration.
fn altered_lora(keys: &[(&str, Value)]) -> Lora {
    let dir = tempfile::tempdir().unwrap();
    let weights = "adapter_model.safetensors";
    fs::copy(golden("lora").join(weights), dir.path().join(weights)).unwrap();
    let mut config = json_of(&golden("lora/adapter_config.json"));
    for (key, value) in keys {
        config[key] = value.clone();
    }
    fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    peft::load(dir.path(), &golden_model().config).unwrap()
}

#[test]
fn rank_stabilised_adapters_act_as_with_an_alpha_greater_by_the_root_of_the_rank() {
    let model = golden_model();
    let device = Device::cpu(1).unwrap();
    let output = |lora: Lora| {
        let layout = Layout::new(&model.config, 1, 5).unwrap();
        let ids = Tensor::from_u32(vec![3, 1, 4, 1, 5], [5]).unwrap();
        let inference = Inference {
            adapters: Some(&lora),
            ..Inference::new(&model)
        };
        values(&inference.hidden(&device, ids, &layout).unwrap())
    };
    let stabilised = output(altered_lora(&[("use_rslora", json!(true))]));
    // r is 4, alpha 16.
    assert_eq!(
        stabilised,
        output(altered_lora(&[("lora_alpha", json!(32))]))
    );
    assert_ne!(stabilised, output(altered_lora(&[])));
}

#[test]
fn all_linear_means_the_seven_modules() {
    let lora = altered_lora(&[("target_modules", json!("all-linear"))]);
    assert_eq!(lora.config.targets, Module::ALL);
    assert_eq!(lora.pairs.len(), 28);
}

#[test]
fn an_autoencoder_of_sparsify_comes_back_as_it_was() {
    let sae = sparsify::load(&golden("sae")).unwrap();
    assert_eq!(
        (sae.config.d_in, sae.config.num_latents, sae.config.k),
        (64, 512, 8)
    );
    let original = reference(&golden("sae/sae.safetensors"));
    assert_eq!(values(&sae.w_enc), f32s(&original["encoder.weight"].2));
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("model.layers.1");
    sparsify::save(&below, &sae).unwrap();
    assert_eq!(reference(&below.join("sae.safetensors")), original);
    assert_eq!(
        json_of(&below.join("cfg.json")),
        json_of(&golden("sae/cfg.json"))
    );
    assert_eq!(sparsify::hookpoint_dir(dir.path(), 1).unwrap(), below);
    assert_eq!(sparsify::hookpoint_dir(&below, 1).unwrap(), below);
    assert!(sparsify::hookpoint_dir(dir.path(), 2).is_err());
}

#[test]
fn saving_an_autoencoder_again_replaces_both_files() {
    let mut sae = sparsify::load(&golden("sae")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    sparsify::save(dir.path(), &sae).unwrap();
    sae.config.k = 4;
    sae.b_dec.f32s_mut().unwrap().fill(0.25);
    sparsify::save(dir.path(), &sae).unwrap();
    let back = sparsify::load(dir.path()).unwrap();
    assert_eq!(back.config.k, 4);
    assert_eq!(values(&back.b_dec), [0.25; 64]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn no_number_of_latents_means_the_expansion_factor() {
    let dir = tempfile::tempdir().unwrap();
    let weights = "sae.safetensors";
    fs::copy(golden("sae").join(weights), dir.path().join(weights)).unwrap();
    let cfg = json!({"d_in": 64, "k": 8, "num_latents": 0, "expansion_factor": 8, "later_key": 1});
    fs::write(dir.path().join("cfg.json"), cfg.to_string()).unwrap();
    let sae = sparsify::load(dir.path()).unwrap();
    assert_eq!(sae.config.num_latents, 512);
    assert!(sae.config.normalize_decoder && !sae.config.multi_topk);
}

#[test]
fn floats_are_stored_rounded_to_nearest_even() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    // Ties at the last place of either type, one to each side, and values between.
    let given: Vec<f32> = vec![
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        1.0 + 1.0 / 2048.0,
        1.0 + 3.0 / 2048.0,
        -1.0e-3,
        65_504.0,
        0.0,
    ];
    let tensor = Tensor::from_vec(given.clone(), [7]).unwrap();
    let ids = Tensor::from_u32(vec![0, 7, u32::MAX], [3, 1]).unwrap();
    let entries = vec![
        Entry::new("half", &tensor).stored_as(DType::F16),
        Entry::new("brain", &tensor).stored_as(DType::Bf16),
        Entry::new("full", &tensor),
        Entry::new("ids", &ids),
    ];
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write(&path, entries, &metadata).unwrap();
    let stored = reference(&path);
    let (half, brain) = (&stored["half"], &stored["brain"]);
    assert_eq!(
        (half.0, brain.0, stored["ids"].0),
        (Dtype::F16, Dtype::BF16, Dtype::U32)
    );
    assert_eq!(f32s(&stored["full"].2), given);
    // 1 + 2^-8 and 1 + 3 2^-8 lie halfway between bf16 neighbours: to even, 1 and 1 + 2^-6.
    assert_eq!(brain.2[..4], [0x80, 0x3f, 0x82, 0x3f]);
    // 1 + 2^-11 and 1 + 3 2^-11 lie halfway between f16 neighbours: to even, 1 and 1 + 2^-9.
    assert_eq!(half.2[4..8], [0x00, 0x3c, 0x02, 0x3c]);
    let file = SafeTensors::open(&path).unwrap();
    assert_eq!(file.metadata("format"), Some("pt"));
    assert!(file.names().eq(["brain", "full", "half", "ids"]));
    assert_eq!(
        file.tensor("ids").unwrap().u32s().unwrap(),
        [0, 7, u32::MAX]
    );
    assert_eq!(file.tensor("full").unwrap().f32s().unwrap(), given);
}

#[test]
fn tensors_at_odd_offsets_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let mut header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]},"c":{"dtype":"BF16","shape":[1],"data_offsets":[9,11]}}"#.to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header);
    bytes.push(0);
    bytes.extend([1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
    bytes.extend(bf16::from_f32(3.0).to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let file = SafeTensors::open(&path).unwrap();
    assert_eq!(file.tensor("b").unwrap().f32s().unwrap(), [1.5, -2.0]);
    assert_eq!(values(&file.tensor("c").unwrap()), [3.0]);
    let error = file.tensor("a").unwrap_err().to_string();
    assert!(
        error.contains("x.safetensors") && error.contains("U8"),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn written_files_have_the_permissions_of_ordinary_ones() {
    use std::os::unix::fs::PermissionsExt;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    let dir = tempfile::tempdir().unwrap();
    let ordinary = dir.path().join("ordinary");
    fs::write(&ordinary, "").unwrap();
    sparsify::save(dir.path(), &sparsify::load(&golden("sae")).unwrap()).unwrap();
    assert_eq!(mode(&dir.path().join("sae.safetensors")), mode(&ordinary));
    fs::create_dir(dir.path().join("folder")).unwrap();
    huggingface::save_merged(
        &golden("model"),
        &[golden_lora()],
        &dir.path().join("merged"),
    )
    .unwrap();
    assert_eq!(
        mode(&dir.path().join("merged")),
        mode(&dir.path().join("folder"))
    );
}
