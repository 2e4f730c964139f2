use resa_engine::model::Qwen2Config;
use resa_engine::train::plan::{Plan, PlanInput, checkpoint_bytes};
use resa_engine::train::{Method, SaeInit, SaeOptimizer, Schedule, Stage, TrainConfig};

/// DeepSeek-R1-Distill-Qwen-1.5B.
pub(super) fn qwen() -> Qwen2Config {
    Qwen2Config {
        vocab_size: 151_936,
        hidden_size: 1536,
        intermediate_size: 8960,
        num_hidden_layers: 28,
        num_attention_heads: 12,
        num_key_value_heads: 2,
        head_dim: 128,
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        attention_bias: true,
    }
}

/// Sequences so short and adapters so narrow that only the matrix products with weights count.
fn weights_alone() -> TrainConfig {
    TrainConfig {
        hookpoints: vec![12],
        latents: Some(65_536),
        seq_len: 2,
        lora_r: 1,
        ..TrainConfig::default()
    }
}

fn plan(config: &TrainConfig) -> Plan {
    plan_with_activations(config, 4)
}

/// The same with values of activations of that size.
fn plan_with_activations(config: &TrainConfig, activation_bytes: usize) -> Plan {
    let model = qwen();
    let input = PlanInput {
        source: &model,
        target: &model,
        source_rows: 1000,
        target_rows: 1000,
        weight_bytes: 2,
        activation_bytes,
        flop_per_s: Some(1e12),
    };
    Plan::new(config, &input).unwrap()
}

fn assert_near(found: f64, expected: f64) {
    assert!(
        (found / expected - 1.0).abs() < 0.01,
        "{found:e} is not near {expected:e}"
    );
}

#[test]
fn flop_per_token_agree_with_the_count_by_hand() {
    // A layer: q and o 1536², k and v 256 x 1536, three of 8960 x 1536; two FLOP a weight.
    let layer = 2.0 * (2.0 * 1536.0f64.powi(2) + 2.0 * 256.0 * 1536.0 + 3.0 * 8960.0 * 1536.0);
    let head = 2.0 * 151_936.0 * 1536.0;
    let encoder = 2.0 * 65_536.0 * 1536.0;
    let plan = plan(&weights_alone());
    let [sae, sft] = plan.stages.as_slice() else {
        panic!("{plan:?}")
    };
    assert_near(sae.flop_per_token, 13.0 * layer + encoder);
    let later = 15.0 * 2.0 * layer + 3.0 * head;
    assert_near(sft.flop_per_token_later, later);
    assert_near(
        sft.flop_per_token,
        later + 13.0 * layer + encoder + 15.0 * layer,
    );
    assert_near(sft.flop_per_token, 7.03e9);
    assert_near(sft.flop_per_token_later, 4.21e9);
}

#[test]
fn attention_grows_with_the_length_of_a_sequence() {
    let cost = |seq_len| {
        let config = TrainConfig {
            seq_len,
            stage: Stage::Sae,
            ..weights_alone()
        };
        plan(&config).stages[0].flop_per_token
    };
    // Two products with an average of half the keys, at 12 heads of 128, in 13 layers.
    assert_near(cost(4096) - cost(2048), 13.0 * 2.0 * 2.0 * 1024.0 * 1536.0);
}

#[test]
fn steps_and_tokens_follow_epochs_batches_and_limits() {
    let counts = |rows, per_step, epochs, max| {
        let schedule = Schedule::new(rows, per_step, epochs, max);
        (schedule.steps, schedule.rows_until(schedule.steps))
    };
    assert_eq!(counts(33, 16, 2, None), (6, 66));
    assert_eq!(counts(32, 16, 2, None), (4, 64));
    // An epoch of 16, 16 and 1 rows, and two steps of the next.
    assert_eq!(counts(33, 16, 2, Some(5)), (5, 65));
    assert_eq!(counts(0, 16, 2, None), (0, 0));
    assert_eq!(counts(u64::MAX, 1, usize::MAX, None), (u64::MAX, u64::MAX));

    let config = TrainConfig {
        grad_accum: 4,
        max_sae_steps: Some(3),
        ..weights_alone()
    };
    let plan = plan(&config);
    let [sae, sft] = plan.stages.as_slice() else {
        panic!("{plan:?}")
    };
    assert_eq!((sae.steps, sae.tokens), (3, 3 * 16 * 2));
    assert_eq!((sft.steps, sft.tokens), (500, 2 * 1000 * 2));
    assert_near(
        sft.flop,
        2000.0 * (sft.flop_per_token + sft.flop_per_token_later),
    );
    assert_near(plan.seconds.unwrap(), (sae.flop + sft.flop) / 1e12);
}

#[test]
fn only_the_stages_that_run_are_planned() {
    let names = |config: TrainConfig| -> Vec<&'static str> {
        plan(&config)
            .stages
            .iter()
            .map(|stage| stage.stage)
            .collect()
    };
    let base = weights_alone;
    assert_eq!(
        names(TrainConfig {
            stage: Stage::Sae,
            ..base()
        }),
        ["sae"]
    );
    assert_eq!(
        names(TrainConfig {
            stage: Stage::Sft,
            ..base()
        }),
        ["sft"]
    );
    assert_eq!(
        names(TrainConfig {
            method: Method::Sft,
            ..base()
        }),
        ["sft"]
    );
    assert_eq!(
        names(TrainConfig {
            sae_init: SaeInit::Pretrained,
            ..base()
        }),
        ["sft"]
    );
}

#[test]
fn activations_take_the_bytes_of_their_type() {
    let activations = |activation_bytes| {
        let plan = plan_with_activations(&weights_alone(), activation_bytes);
        let of = |(stage, what): (usize, &str)| {
            let mut parts = plan.stages[stage].memory.iter();
            parts.find(|part| part.what == what).unwrap().bytes as f64
        };
        [
            (0, "activations"),
            (1, "activations for backward"),
            (1, "activation cache"),
        ]
        .map(of)
    };
    for (short, long) in activations(2).into_iter().zip(activations(4)) {
        assert_near(long, 2.0 * short);
    }
}

#[test]
fn a_checkpoint_holds_weights_and_the_optimizers_state_of_the_larger_stage() {
    let bytes = |config| checkpoint_bytes(&config, &qwen(), &qwen()).unwrap() as f64;
    let sae = 2.0 * 1536.0 * 65_536.0;
    assert_near(bytes(weights_alone()), 4.0 * 2.0 * sae);
    let adam = TrainConfig {
        sae_optimizer: SaeOptimizer::Adam,
        ..weights_alone()
    };
    assert_near(bytes(adam), 4.0 * 3.0 * sae);
    let tuning = TrainConfig {
        stage: Stage::Sft,
        ..weights_alone()
    };
    // Outputs and inputs of q and o, k and v, gate and up, down.
    let sides = 2.0 * 3072.0 + 2.0 * 1792.0 + 3.0 * 10_496.0;
    assert_near(bytes(tuning), 4.0 * 3.0 * 28.0 * sides);
}

#[test]
fn the_plan_is_read_by_people_and_programs() {
    let plan = plan(&weights_alone());
    let text = plan.to_string();
    for expected in [
        "Stage I",
        "Stage II",
        "steps",
        "GFLOP",
        "GiB",
        "in later epochs",
    ] {
        assert!(text.contains(expected), "{expected} in\n{text}");
    }
    let json = serde_json::to_value(&plan).unwrap();
    assert_eq!(json["stages"][0]["steps"], plan.stages[0].steps);
    assert!(json["stages"][1]["memory"][0]["bytes"].as_u64().unwrap() > 3_000_000_000);
}
