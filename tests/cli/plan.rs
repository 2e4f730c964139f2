//! `--dry-run` says beforehand what a run does, and does nothing.

use serde_json::Value;

use super::support::{Workshop, fixture, metrics};

#[test]
fn the_plan_counts_the_steps_and_tokens_that_the_run_then_takes_and_writes_nothing() {
    let workshop = Workshop::new(22);
    let source = fixture("example/source");
    let other = fixture("example/eval.jsonl");
    let (source, other) = (source.to_str().unwrap(), other.to_str().unwrap());
    for (case, more) in [
        &["--epochs", "2", "--grad-accum", "2", "--source", source][..],
        &[
            "--sae-epochs",
            "3",
            "--max-sae-steps",
            "7",
            "--max-sft-steps",
            "5",
        ],
        &["--elicitation-data", other, "--sft-batch", "7"],
        &["--stage", "sae", "--layer", "1", "--layer", "4"],
        &["--method", "sft", "--epochs", "2"],
    ]
    .into_iter()
    .enumerate()
    {
        let out = format!("run-{case}");
        let before = workshop.names();
        let args = workshop.train_args(&out, &[more, &["--dry-run", "--json"]].concat());
        let plan: Value = serde_json::from_str(&workshop.prints(&args)).unwrap();
        assert_eq!(workshop.names(), before, "a dry run writes nothing");

        workshop.train(&out, more);
        let run = metrics(&workshop.path(&out));
        let mut last: Vec<Value> = Vec::new();
        for line in run {
            let same = last.iter_mut().find(|l| l["stage"] == line["stage"]);
            match same {
                Some(earlier) => *earlier = line,
                None => last.push(line),
            }
        }
        let counts = |stages: &[Value]| -> Vec<_> {
            let of = |s: &Value| ["stage", "tokens"].map(|key| s[key].clone());
            stages.iter().map(of).collect()
        };
        let planned = plan["stages"].as_array().unwrap();
        assert_eq!(counts(planned), counts(&last), "{more:?}");
        for (plan, run) in planned.iter().zip(&last) {
            assert_eq!(plan["steps"], run["step"], "{more:?}");
        }
    }
}

#[test]
fn the_plan_counts_the_latents_of_the_sae_that_is_given() {
    let workshop = Workshop::new(22);
    let settings = ["--stage", "sae", "--latents", "320", "--k", "5"];
    workshop.train("run", &[&settings[..], &["--multi-topk"]].concat());
    let plan = |more: &[&str]| -> Value {
        let args = workshop.train_args("dry", &[more, &["--dry-run", "--json"]].concat());
        let mut plan: Value = serde_json::from_str(&workshop.prints(&args)).unwrap();
        let stage = &mut plan["stages"][0];
        ["flop", "memory"].map(|key| stage[key].take()).into()
    };
    let scratch = plan(&[&settings[..], &["--multi-topk"]].concat());
    let given = ["--sae", "run/sae", "--sae-init"];
    let finetune = [&given[..], &["finetune", "--stage", "sae"]].concat();
    assert_eq!(plan(&finetune), scratch);
    let alone = ["--stage", "sft", "--sae", "run/sae"];
    assert_eq!(plan(&alone), plan(&[&given[..], &["pretrained"]].concat()));
    assert_eq!(
        plan(&alone),
        plan(&[&alone[..], &["--latents", "320", "--k", "5"]].concat())
    );
}

#[test]
fn the_plan_is_shown_with_steps_tokens_memory_and_time() {
    let workshop = Workshop::new(22);
    let text = workshop.train("run", &["--dry-run"]);
    for name in [
        "Stage I: ",
        "Stage II: ",
        "steps",
        "tokens",
        "FLOP",
        "memory",
        "time",
    ] {
        assert!(text.contains(name), "{name} in {text}");
    }
}
