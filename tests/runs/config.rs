use std::path::{Path, PathBuf};

use resa_engine::model::{Lora, LoraConfig, Module, Sae, SaeConfig};
use resa_engine::train::{DeviceSetting, DtypeSetting, SaeInit, SaeOptimizer, Stage, TrainConfig};
use resa_engine::{Device, Error};

fn parse(text: &str) -> Result<TrainConfig, Error> {
    TrainConfig::from_toml(text, Path::new("settings.toml"))
}

fn message(result: Result<impl std::fmt::Debug, Error>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn settings_survive_toml_bit_for_bit() {
    let config = TrainConfig {
        stage: Stage::Sft,
        target: Some("org/model \"quoted\"".to_owned()),
        template: Some(PathBuf::from("a b.jinja")),
        hookpoints: vec![3, 12],
        sae: Some(PathBuf::from("sae")),
        sae_init: SaeInit::Finetune,
        latents: Some(4096),
        multi_topk: true,
        sae_optimizer: SaeOptimizer::Adam,
        sae_lr: Some(1.0 / 3.0),
        lr: 5e-324,
        lora_dropout: 0.1 + 0.2,
        lora_targets: vec![Module::Q, Module::Down],
        cache_memory: Some(0.5),
        device: DeviceSetting::Cuda(2),
        dtype: DtypeSetting::Bf16,
        seed: i64::MAX as u64,
        ..TrainConfig::default()
    };
    for config in [config, TrainConfig::default()] {
        assert_eq!(parse(&config.to_toml().unwrap()).unwrap(), config);
    }
}

#[test]
fn keys_are_the_long_options() {
    let config =
        parse("sae-batch = 4\nlora-r = 8\nlr = 1\nlayer = 5\nlora-targets = \"q_proj,k_proj\"")
            .unwrap();
    assert_eq!((config.sae_batch, config.lora_r, config.lr), (4, 8, 1.0));
    assert_eq!(config.hookpoints, [5]);
    assert_eq!(config.lora_targets, [Module::Q, Module::K]);
    assert_eq!(config.seed, 42, "keys that are absent keep their defaults");
}

#[test]
fn a_hookpoint_is_written_in_any_of_its_three_ways() {
    for text in [
        "\"model.layers.7\"",
        "\"layers.7\"",
        "7",
        "\"7\"",
        "[7]",
        "[\"layers.7\"]",
    ] {
        let config = parse(&format!("hookpoint = {text}")).unwrap();
        assert_eq!(config.hookpoints, [7], "{text}");
    }
    for text in ["\"model.layer.7\"", "\"layers.-1\"", "-1", "true", "\"\""] {
        assert!(parse(&format!("hookpoint = {text}")).is_err(), "{text}");
    }
}

#[test]
fn an_unknown_key_is_named_with_its_file_and_line() {
    let text = message(parse("k = 4\nlatent = 5"));
    assert!(
        text.contains("settings.toml: line 2") && text.contains("`latent`"),
        "{text}"
    );
    assert!(text.len() < 80, "no list of all keys: {text}");
}

#[test]
fn a_wrong_value_is_named_with_what_was_expected() {
    for (text, expected) in [
        ("k = \"many\"", "usize"),
        ("k = -1", "usize"),
        ("stage = \"both\"", "`all`, `sae`, `sft`"),
        ("device = \"tpu\"", "cuda:N"),
        ("lora-targets = [\"q\"]", "q_proj"),
        ("k = ", ""),
    ] {
        let error = message(parse(text));
        assert!(
            error.contains("settings.toml") && error.contains(expected),
            "{text}: {error}"
        );
    }
}

#[test]
fn the_defaults_are_valid() {
    TrainConfig::default().validate().unwrap();
}

#[test]
fn every_setting_without_sense_is_refused_by_its_name() {
    let cases = [
        ("k = 0", "--k"),
        ("k = 33\nlatents = 32", "--k"),
        ("latents = 0", "--latents"),
        ("expansion = 0", "--expansion"),
        ("seq-len = 1", "--seq-len"),
        ("seq-len = 9223372036854775807", "--seq-len"),
        ("sft-batch = 9223372036854775807", "--sft-batch"),
        ("epochs = 9223372036854775807", "--epochs"),
        ("sae-batch = 0", "--sae-batch"),
        ("sft-batch = 0", "--sft-batch"),
        ("grad-accum = 0", "--grad-accum"),
        ("epochs = 0", "--epochs"),
        ("sae-epochs = 0", "--sae-epochs"),
        ("max-sae-steps = 0", "--max-sae-steps"),
        ("max-sft-steps = 0", "--max-sft-steps"),
        ("keep = 0", "--keep"),
        ("threads = 1025", "--threads"),
        ("log-every = 0", "--log-every"),
        ("lr = nan", "--lr"),
        ("lr = 0.0", "--lr"),
        ("lr = inf", "--lr"),
        ("sae-lr = -0.1", "--sae-lr"),
        ("clip = 0", "--clip"),
        ("weight-decay = -1", "--weight-decay"),
        ("auxk-alpha = nan", "--auxk-alpha"),
        ("cache-memory = -1", "--cache-memory"),
        ("lora-r = 0", "--lora-r"),
        ("lora-alpha = 0", "--lora-alpha"),
        ("lora-dropout = 1", "--lora-dropout"),
        ("lora-dropout = -0.1", "--lora-dropout"),
        ("lora-targets = []", "--lora-targets"),
        ("lora-targets = \"q_proj,q_proj\"", "--lora-targets"),
        ("layer = [1, 1]", "--hookpoint"),
        ("out = \"\"", "--out"),
        ("stage = \"sae\"\nmethod = \"sft\"", "--stage"),
        ("sae-init = \"finetune\"", "--sae"),
        ("sae-init = \"pretrained\"", "--sae"),
        ("stage = \"sft\"", "--sae"),
        ("data = \"x.jsonl\"", "--target"),
        ("source = \"x\"\ndata = \"x.jsonl\"", "--target"),
        ("target = \"x\"", "--data"),
    ];
    for (text, option) in cases {
        let error = parse(text).unwrap().validate().unwrap_err();
        let Error::Setting { option: named, .. } = &error else {
            panic!("{text}: {error:?}");
        };
        assert_eq!(named, option, "{text}: {error}");
    }
}

#[test]
fn the_default_hookpoint_is_layer_12_of_28_in_proportion() {
    let config = TrainConfig::default();
    for (layers, hookpoint) in [(28, 12), (30, 12), (4, 1), (2, 0)] {
        assert_eq!(config.hookpoints_for(layers).unwrap(), [hookpoint]);
    }
}

#[test]
fn a_hookpoint_must_be_a_layer_with_one_to_train_after_it() {
    let mut config = parse("layer = 28").unwrap();
    let error = message(config.hookpoints_for(28));
    assert!(
        error.contains("--hookpoint") && error.contains("28 layers"),
        "{error}"
    );
    config.hookpoints = vec![27];
    assert!(message(config.hookpoints_for(28)).contains("last"));
    config.stage = Stage::Sae;
    assert_eq!(config.hookpoints_for(28).unwrap(), [27]);
}

#[test]
fn latents_are_counted_without_overflow() {
    let config = parse("expansion = 9223372036854775807").unwrap();
    assert!(message(config.latents_for(1536)).contains("--expansion"));
    let config = parse("latents = 4294967297").unwrap();
    assert!(message(config.latents_for(1536)).contains("--latents"));
    assert_eq!(TrainConfig::default().latents_for(1024).unwrap(), 65536);
}

#[test]
fn more_weights_than_memory_has_room_for_are_an_error_with_the_option() {
    const MUCH: usize = usize::MAX / 4096;
    let device = Device::cpu(1).unwrap();
    let sae = Sae::scratch(&device, SaeConfig::new(2048, MUCH, 4), 1, 0);
    assert!(message(sae).starts_with("--latents: "));
    let lora = LoraConfig {
        r: MUCH,
        ..TrainConfig::default().lora()
    };
    let lora = Lora::new(lora, &super::plan::qwen(), 0..1, 1);
    assert!(message(lora).starts_with("--lora-r: "));
}

#[test]
fn a_device_starts_a_limited_number_of_threads() {
    assert!(message(Device::cpu(99_999_999)).starts_with("--threads: "));
}

#[test]
fn multi_topk_needs_four_times_k_latents() {
    let config = parse("multi-topk = true\nk = 8\nlatents = 31").unwrap();
    assert!(message(config.latents_for(16)).contains("--multi-topk"));
    let config = parse("multi-topk = true\nk = 8\nlatents = 32").unwrap();
    assert_eq!(config.latents_for(16).unwrap(), 32);
}

#[test]
fn the_learning_rate_of_stage_one_falls_with_the_root_of_the_latents() {
    let signum = SaeOptimizer::Signum;
    assert!((signum.default_lr(1 << 14) - 5e-3).abs() < 1e-18);
    assert!((signum.default_lr(1 << 16) - 2.5e-3).abs() < 1e-18);
    assert!((SaeOptimizer::Adam.default_lr(1 << 16) - 1e-4).abs() < 1e-18);
}

#[test]
fn a_resumed_run_refuses_changed_settings_by_name_and_allows_the_harmless() {
    let stored = TrainConfig::default();
    let mut now = parse("threads = 1\nkeep = 9\nlog-every = 5\nout = \"moved\"").unwrap();
    now.check_resumes(&stored).unwrap();
    now.lr = 2e-6;
    let error = message(now.check_resumes(&stored));
    assert!(
        error.starts_with("--lr: ") && error.contains("0.000001,") && error.contains("0.000002"),
        "{error}"
    );
    let error = message(parse("latents = 64").unwrap().check_resumes(&stored));
    assert!(
        error.starts_with("--latents: ") && error.contains("not set"),
        "{error}"
    );
}
