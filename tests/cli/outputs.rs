//! What a run leaves is complete, and the other commands read it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::support::{Left, Workshop, copy_dir, fixture, metrics};

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

#[test]
fn a_run_folder_holds_settings_measurements_checkpoints_and_results() {
    let workshop = Workshop::new(22);
    workshop.train("run", &["--seed", "7", "--keep", "2"]);
    let run = workshop.path("run");
    let mut found = names(&run);
    let events: Vec<_> = found
        .iter()
        .filter(|name| name.starts_with("events.out.tfevents."))
        .cloned()
        .collect();
    assert_eq!(events.len(), 1);
    assert!(fs::metadata(run.join(&events[0])).unwrap().len() > 100);
    found.remove(&events[0]);
    let expected = [
        ".lock",
        "adapter",
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "sae",
    ];
    assert_eq!(found, set(&expected));
    let adapter = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&run.join("adapter")), set(&adapter));
    assert_eq!(names(&run.join("sae")), set(&["best", "model.layers.2"]));
    for sae in ["model.layers.2", "best/model.layers.2"] {
        let files = set(&["cfg.json", "sae.safetensors"]);
        assert_eq!(names(&run.join("sae").join(sae)), files);
    }
    assert_eq!(names(&run.join("checkpoints")).len(), 2);

    let settings: toml::Table = fs::read_to_string(run.join("config.toml"))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(settings["seed"].as_integer(), Some(7));
    // What was not given is there as well.
    assert_eq!(settings["weight-decay"].as_float(), Some(0.01));
}

#[test]
fn each_step_is_a_line_with_the_fields_of_its_stage() {
    let workshop = Workshop::new(22);
    workshop.train("run", &[]);
    workshop.train("baseline", &["--method", "sft"]);
    let common = [
        "stage",
        "step",
        "epoch",
        "tokens",
        "seconds",
        "tokens_per_s",
        "lr",
    ];
    let sae = ["hookpoint", "fvu", "fvu_no_sinks", "dead_fraction"];
    let sft = ["kl", "kl_per_token", "sae_mse", "grad_norm"];
    let baseline = ["loss", "grad_norm"];
    for (run, stage, own) in [
        ("run", "sae", &sae[..]),
        ("run", "sft", &sft),
        ("baseline", "sft", &baseline),
    ] {
        let lines = metrics(&workshop.path(run));
        let lines: Vec<_> = lines.iter().filter(|l| l["stage"] == stage).collect();
        for (i, line) in lines.iter().enumerate() {
            let fields: BTreeSet<_> = line.as_object().unwrap().keys().cloned().collect();
            assert_eq!(fields, set(&[&common[..], own].concat()));
            assert_eq!(line["step"], i + 1);
        }
        assert_eq!(
            lines.last().unwrap()["epoch"],
            if stage == "sae" { 1.0 } else { 2.0 }
        );
    }
}

#[test]
fn what_a_run_measured_is_printed_as_json() {
    let workshop = Workshop::new(60);
    let printed = workshop.train("run", &["--json"]);
    let printed: Value = serde_json::from_str(&printed).unwrap();
    let lines = metrics(&workshop.path("run"));
    let of = |field: &str| -> Vec<f64> {
        let found = lines.iter().filter_map(|line| line[field].as_f64());
        found.collect()
    };
    let (fvu, kl) = (of("fvu"), of("kl_per_token"));
    assert!(fvu.len() > 1 && kl.len() > 10);
    assert_eq!(printed["fvu"], json!([[2, fvu[0], fvu[fvu.len() - 1]]]));
    let mean = |ten: &[f64]| ten.iter().sum::<f64>() / 10.0;
    let loss = [mean(&kl[..10]), mean(&kl[kl.len() - 10..])];
    assert_eq!(printed["loss"], json!(loss));
    assert_eq!(printed["out"], "run");
    assert_eq!(printed["pass_at_1"], Value::Null);
}

#[test]
fn the_number_of_threads_has_no_part_in_the_numbers() {
    let workshop = Workshop::new(22);
    workshop.train("two", &["--lora-dropout", "0.1", "--shuffle"]);
    workshop.train(
        "one",
        &["--lora-dropout", "0.1", "--shuffle", "--threads", "1"],
    );
    let two = Left::by(&workshop.path("two"));
    two.assert_same(&Left::by(&workshop.path("one")), "one thread");
}

/// `eval --perplexity` of a model on the workshop's text.
fn mean_nll(workshop: &Workshop, model: &str, more: &[&str]) -> f64 {
    let template = fixture("example/template.jinja");
    let args = [
        "eval",
        "--perplexity",
        "--json",
        "--data",
        "data.jsonl",
        "--seq-len",
        "40",
    ];
    let given = ["--model", model, "--template", template.to_str().unwrap()];
    let text = workshop.prints(&[&args[..], &given, more].concat());
    let json: Value = serde_json::from_str(&text).unwrap();
    let (nll, perplexity) = (&json["mean_nll"], &json["perplexity"]);
    let nll = nll.as_f64().unwrap();
    assert!((nll.exp() / perplexity.as_f64().unwrap() - 1.0).abs() < 1e-9);
    assert_eq!(
        json["tokens"].as_u64().unwrap() % 39,
        0,
        "all of a row but its first"
    );
    nll
}

#[test]
fn a_merged_model_has_the_perplexity_of_model_and_adapter() {
    let workshop = Workshop::new(22);
    // A model in f32, so that merging rounds nothing away.
    copy_dir(&fixture("golden/model"), &workshop.path("model"));
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let from = fixture("example/target").join(name);
        fs::copy(from, workshop.path("model").join(name)).unwrap();
    }
    let settings = ["--target", "model", "--layer", "1", "--lr", "0.01"];
    workshop.train("run", &settings);
    let merge = [
        "merge",
        "--model",
        "model",
        "--adapter",
        "run/adapter",
        "--out",
        "merged",
    ];
    workshop.prints(&merge);
    let nll = |model: &str, more: &[&str]| {
        // In bf16 the products of weights and of adapters are rounded apart.
        mean_nll(&workshop, model, &[&["--dtype", "f32"], more].concat())
    };
    let base = nll("model", &[]);
    let adapter = nll("model", &["--adapter", "run/adapter"]);
    let merged = nll("merged", &[]);
    assert!((adapter - base).abs() > 1e-2, "{base} and {adapter}");
    assert!((merged - adapter).abs() < 1e-4, "{adapter} and {merged}");
}

#[test]
fn an_inserted_sae_costs_perplexity_and_the_adapter_trained_for_it_wins_some_back() {
    let workshop = Workshop::new(60);
    let settings = ["--sae-epochs", "4", "--epochs", "6", "--lr", "0.003"];
    workshop.train("run", &settings);
    let target = fixture("example/target");
    let nll = |more: &[&str]| mean_nll(&workshop, target.to_str().unwrap(), more);
    let sae = ["--sae", "run/sae", "--layer", "2"];
    let (alone, inserted) = (nll(&[]), nll(&sae));
    let tuned = nll(&[&sae[..], &["--adapter", "run/adapter"]].concat());
    assert!(
        alone < tuned && tuned < inserted,
        "{alone} {tuned} {inserted}"
    );
}

#[test]
fn greedy_answers_of_the_example_are_as_right_as_pytorch_found_them() {
    let workshop = Workshop::new(1);
    let source = fixture("example/source");
    let data = fixture("example/eval.jsonl");
    let template = fixture("example/template.jinja");
    let mut args = vec!["eval", "--max-new-tokens", "24", "--temperature", "0"];
    for (option, path) in [
        ("--model", &source),
        ("--data", &data),
        ("--template", &template),
    ] {
        args.extend([option, path.to_str().unwrap()]);
    }
    let json = workshop.prints(&[&args[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json).unwrap();
    // 86.0 % of 200 (README.md beside the example); rounding may turn a close decision.
    let right = json["correct"].as_i64().unwrap();
    assert!((right - 172).abs() <= 1, "{json}");
    assert_eq!(json["problems"], 200);
    assert_eq!(json["pass_at_1"].as_f64().unwrap(), right as f64 / 200.0);
    let text = workshop.prints(&[&args[..], &["--limit", "5"]].concat());
    assert!(
        text.starts_with("Pass@1 ") && text.contains(" of 5 completions right"),
        "{text}"
    );
}

#[test]
fn a_source_alone_is_enough_for_stage_one() {
    let workshop = Workshop::new(22);
    let source = fixture("example/source");
    let template = fixture("example/template.jinja");
    let args = [
        "train",
        "--stage",
        "sae",
        "--source",
        source.to_str().unwrap(),
        "--data",
        "data.jsonl",
        "--template",
        template.to_str().unwrap(),
        "--layer",
        "4",
        "--seq-len",
        "40",
        "--k",
        "4",
        "--latents",
        "64",
        "--sae-batch",
        "3",
        "--out",
        "alone",
    ];
    workshop.prints(&args);
    let settings = [
        "--stage",
        "sae",
        "--layer",
        "4",
        "--k",
        "4",
        "--latents",
        "64",
    ];
    let with_target = [&settings[..], &["--source", source.to_str().unwrap()]].concat();
    workshop.train("both", &with_target);
    let alone = Left::by(&workshop.path("alone"));
    // How often the best is looked for is the only difference.
    for file in ["cfg.json", "sae.safetensors"] {
        let name = Path::new("sae/model.layers.4").join(file);
        assert!(alone.files[&name] == Left::by(&workshop.path("both")).files[&name]);
    }
}
