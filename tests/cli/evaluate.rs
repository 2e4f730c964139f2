//! `eval` on problems with answers, `generate`, and `merge` of several adapters.

use std::fs;
use std::path::Path;

use resa_engine::data::{Template, Tokenizer, records};
use resa_engine::eval::Inference;
use resa_engine::formats::{huggingface, sparsify};
use serde_json::{Value, json};

use super::generate::greedy;
use super::support::{Workshop, copy_dir, fixture, stderr};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// `eval` of the example's source on its first held-out problems, with `more`.
fn eval_args(more: &[&str]) -> Vec<String> {
    let (model, data) = (fixture("example/source"), fixture("example/eval.jsonl"));
    let template = fixture("example/template.jinja");
    let mut args = vec!["eval".to_owned()];
    for (option, path) in [
        ("--model", model),
        ("--data", data),
        ("--template", template),
    ] {
        args.extend([option.to_owned(), text(&path)]);
    }
    let rest = [
        "--limit",
        "6",
        "--max-new-tokens",
        "24",
        "--samples",
        "4",
        "--temperature",
        "1",
    ];
    let kept = rest
        .chunks(2)
        .filter(|option| !more.contains(&option[0]))
        .flatten();
    args.extend(kept.chain(more).map(|arg| (*arg).to_owned()));
    args
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn sorted(mut lines: Vec<Value>) -> Vec<Value> {
    lines.sort_by_key(|line| (line["index"].as_u64(), line["sample"].as_u64()));
    lines
}

#[test]
fn an_evaluation_leaves_its_completions_and_pass_at_k_follows_from_them() {
    let workshop = Workshop::new(1);
    let printed = workshop.prints(&eval_args(&["--out", "out.jsonl", "--json"]));
    let result: Value = serde_json::from_str(&printed).unwrap();
    let lines = lines(&workshop.path("out.jsonl"));
    assert_eq!(lines.len(), 24);
    let mut right = [0u32; 6];
    for line in &lines {
        for key in ["problem", "answer", "completion"] {
            assert!(line[key].is_string(), "{line}");
        }
        assert!(line["settings"]["temperature"] == 1.0 && line["tokens"].as_u64() > Some(0));
        right[line["index"].as_u64().unwrap() as usize] += u32::from(line["correct"] == true);
    }
    assert_eq!(result["correct"], right.iter().sum::<u32>());
    assert_eq!(
        (&result["problems"], &result["completions"]),
        (&json!(6), &json!(24))
    );
    let mean = |share: &dyn Fn(u32) -> f64| right.iter().map(|&c| share(c)).sum::<f64>() / 6.0;
    let want = [
        (1, mean(&|c| f64::from(c) / 4.0)),
        // Two drawn of four of which c are right: 1 - C(4 - c, 2) / 6.
        (
            2,
            mean(&|c| 1.0 - [6.0, 3.0, 1.0, 0.0, 0.0][c as usize] / 6.0),
        ),
        (4, mean(&|c| f64::from(c.min(1)))),
    ];
    let found = result["pass_at_k"].as_array().unwrap();
    assert_eq!(found.len(), 3);
    for (found, (k, value)) in found.iter().zip(want) {
        assert_eq!(found["k"], k);
        let number = |key: &str| found[key].as_f64().unwrap();
        assert!(
            (number("value") - value).abs() < 1e-12,
            "{result} {right:?}"
        );
        assert!(number("low") <= value && value <= number("high"));
    }
}

#[test]
fn an_evaluation_cut_off_in_a_line_goes_on_to_the_same_completions() {
    let workshop = Workshop::new(1);
    workshop.prints(&eval_args(&["--out", "whole.jsonl"]));
    let whole = fs::read_to_string(workshop.path("whole.jsonl")).unwrap();
    let mut kept: Vec<&str> = whole.lines().take(9).collect();
    let torn = &whole.lines().nth(9).unwrap()[..40];
    kept.push(torn);
    fs::write(workshop.path("part.jsonl"), kept.join("\n")).unwrap();
    workshop.prints(&eval_args(&[
        "--out",
        "part.jsonl",
        "--resume",
        "--batch",
        "3",
    ]));
    let read = |name: &str| sorted(lines(&workshop.path(name)));
    assert_eq!(read("part.jsonl"), read("whole.jsonl"));

    for (args, what) in [
        (&["--out", "whole.jsonl"][..], "exists already"),
        (
            &["--out", "whole.jsonl", "--resume", "--seed", "7"],
            "settings",
        ),
        (
            &["--out", "whole.jsonl", "--resume", "--limit", "2"],
            "not problem",
        ),
    ] {
        let output = workshop.resa(&eval_args(args));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
    let after = fs::read_to_string(workshop.path("whole.jsonl")).unwrap();
    assert_eq!(after, whole);
}

#[test]
fn resuming_leaves_alone_what_is_not_its_own() {
    let workshop = Workshop::new(1);
    let one = ["--limit", "1", "--samples", "1", "--out", "out.jsonl"];
    workshop.prints(&eval_args(&one));
    let out = workshop.path("out.jsonl");
    fs::write(workshop.path("other.json"), "[1, 2]").unwrap();
    let refused = |args: &[&str], what: &str, file: &Path| {
        let before = fs::read(file).unwrap();
        let output = workshop.resa(&eval_args(&[args, &["--resume"]].concat()));
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
        assert!(fs::read(file).unwrap() == before, "{what}");
    };
    let other = workshop.path("other.json");
    refused(
        &["--out", "other.json"],
        "not a file of completions",
        &other,
    );
    // Completions of another precision would be mixed with these.
    refused(&[&one[..], &["--dtype", "f32"]].concat(), "settings", &out);
    let file = fs::File::open(&out).unwrap();
    file.lock().unwrap();
    refused(&one, "another process", &out);
}

#[test]
fn completions_of_any_tool_are_graded_again_without_a_model() {
    let workshop = Workshop::new(1);
    let rows = [
        json!({"problem": "p", "answer": "1/2", "completion": "so \\boxed{0.5}", "correct": false, "tool": 7}),
        json!({"problem": "p", "answer": "1/2", "completion": "\\boxed{2}", "correct": false}),
        json!({"problem": "q", "answer": 3, "completion": "it is 3."}),
        json!({"problem": "q", "answer": 3, "completion": ""}),
    ];
    let text = rows
        .iter()
        .map(|row| format!("{row}\n"))
        .collect::<String>();
    fs::write(workshop.path("other.jsonl"), text).unwrap();
    let args = [
        "eval",
        "--regrade",
        "other.jsonl",
        "--out",
        "graded.jsonl",
        "--json",
    ];
    let result: Value = serde_json::from_str(&workshop.prints(&args)).unwrap();
    assert_eq!(result["pass_at_1"], 0.5);
    assert_eq!(
        (&result["problems"], &result["changed"]),
        (&json!(2), &json!(3))
    );
    let graded = lines(&workshop.path("graded.jsonl"));
    let verdicts: Vec<_> = graded.iter().map(|line| line["correct"] == true).collect();
    assert_eq!(verdicts, [true, false, true, false]);
    assert_eq!(
        (&graded[0]["extracted"], &graded[0]["tool"]),
        (&json!("0.5"), &json!(7))
    );
    assert_eq!(graded[3]["extracted"], Value::Null);

    for (content, what) in [
        ("", "holds no completions"),
        ("{\"answer\": \"1\"}", "line 1: key \"completion\""),
        (
            "{\"answer\": [1], \"completion\": \"\"}",
            "line 1: key \"answer\"",
        ),
        ("\n[]", "line 2"),
        ("\u{1}", "line 1"),
    ] {
        fs::write(workshop.path("bad.jsonl"), content).unwrap();
        let output = workshop.resa(&["eval", "--regrade", "bad.jsonl"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
}

/// What a model writes greedily for the first problem of [`eval_args`].
fn first_answer(inference: &Inference) -> String {
    let tokenizer = Tokenizer::from_dir(fixture("example/source")).unwrap();
    let template = Template::from_file(fixture("example/template.jinja")).unwrap();
    let records = records::read(fixture("example/eval.jsonl")).unwrap();
    let prompt = template.prompt(&records[0]).unwrap();
    let prompt = format!("{}{prompt}", tokenizer.eos_token());
    let ids = tokenizer.encode(&prompt, false).unwrap();
    tokenizer
        .decode(&greedy(inference, &ids, 24), false)
        .unwrap()
}

#[test]
fn an_sae_inserted_changes_the_answers() {
    let workshop = Workshop::new(22);
    let source = text(&fixture("example/source"));
    workshop.train("run", &["--stage", "sae", "--target", &source]);
    let greedy = ["--samples", "1", "--temperature", "0", "--json", "--out"];
    let run = |out: &str, more: &[&str]| {
        let options = [&greedy[..], &[out], more].concat();
        workshop.prints(&eval_args(&options));
        sorted(lines(&workshop.path(out)))
            .into_iter()
            .map(|line| line["completion"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let alone = run("alone.jsonl", &[]);
    let inserted = run("inserted.jsonl", &["--sae", "run/sae", "--layer", "2"]);
    assert_ne!(alone, inserted);
    let model = huggingface::load(&fixture("example/source")).unwrap();
    let sae = sparsify::load(&workshop.path("run/sae/model.layers.2")).unwrap();
    let mut inference = Inference::new(&model);
    for (sae, answers) in [(None, alone), (Some((&sae, 2)), inserted)] {
        inference.sae = sae;
        let (want, found) = (first_answer(&inference), &answers[0]);
        assert!(
            !found.is_empty() && want.starts_with(found),
            "{found:?} {want:?}"
        );
    }
}

#[test]
fn generate_writes_text_or_json_for_prompts_given_or_read() {
    let workshop = Workshop::new(1);
    let model = text(&fixture("example/target"));
    let common = [
        "generate",
        "--model",
        &model,
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
    ];
    let run = |more: &[&str]| workshop.resa(&[&common[..], more].concat());
    let one = run(&["--prompt", "What is 7 + 8?", "--raw"]);
    let two = run(&[
        "--prompt",
        "What is 7 + 8?",
        "--prompt",
        "Tom",
        "--json",
        "--ignore-eos",
    ]);
    let lines: Vec<Value> = String::from_utf8(two.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    // The first ends by itself; the others go on.
    let streamed = String::from_utf8(one.stdout).unwrap();
    let whole = lines[0]["text"].as_str().unwrap();
    let shown = streamed.strip_suffix('\n').unwrap();
    assert!(
        !shown.is_empty() && whole.starts_with(shown),
        "{shown:?} {whole:?}"
    );
    assert_eq!(lines[1]["tokens"].as_array().unwrap().len(), 8);
    assert_eq!(
        (&lines[1]["prompt"], &lines[1]["finish"]),
        (&json!(1), &json!("length"))
    );

    for (args, code, what) in [
        (
            &["--prompt", "x", "--temperature=-1"][..],
            2,
            "--temperature",
        ),
        (&["--prompt", "x", "--top-p", "0"], 2, "--top-p"),
        (&["--prompt", "x", "--stop", ""], 2, "--stop"),
        (&["--prompt", "x", "--system", "y"], 1, "--system"),
        (&["--prompt", "", "--raw"], 1, "0 tokens"),
    ] {
        let args: Vec<&str> = match what {
            "--temperature" => ["generate", "--model", &model]
                .iter()
                .chain(args)
                .copied()
                .collect(),
            _ => [&common[..], args].concat(),
        };
        let output = workshop.resa(&args);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(what), "{}", stderr(&output));
    }
}

#[test]
fn merged_adapters_with_weights_add_up_in_the_weights() {
    let workshop = Workshop::new(1);
    let lora = text(&fixture("golden/lora"));
    copy_dir(&fixture("golden/lora"), &workshop.path("again"));
    copy_dir(&fixture("golden/lora"), &workshop.path("a=b"));
    let model = text(&fixture("golden/model"));
    let merge = |out: &str, adapters: &[&str]| {
        let mut args = vec!["merge", "--model", &model, "--out", out];
        adapters
            .iter()
            .for_each(|adapter| args.extend(["--adapter", adapter]));
        workshop.prints(&args);
        fs::read(workshop.path(out).join("model.safetensors")).unwrap()
    };
    let whole = merge("whole", &[&lora]);
    assert!(
        merge("same", &["a=b"]) == whole,
        "a name with = in it is a name"
    );
    let none = merge("none", &[&format!("{lora}=0")]);
    let halves = merge("halves", &[&format!("{lora}=0.5"), "again=0.5"]);
    let none = floats(&none);
    let (whole, halves) = (floats(&whole), floats(&halves));
    let difference = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max)
    };
    assert!(difference(&whole, &none) > 1e-2);
    assert!(difference(&whole, &halves) < 1e-6);

    let (config, given) = (
        ["merge", "--model", &model, "--out", "x"],
        format!("{lora}=much"),
    );
    let output = workshop.resa(&[&config[..], &["--adapter", &given]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("DIR=WEIGHT"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_adapter_of_another_shape_is_refused_with_the_name_of_the_tensor() {
    let workshop = Workshop::new(1);
    let (model, lora) = (
        text(&fixture("example/target")),
        text(&fixture("golden/lora")),
    );
    let args = [
        "merge",
        "--model",
        &model,
        "--adapter",
        &lora,
        "--out",
        "merged",
    ];
    let output = workshop.resa(&args);
    assert_eq!(output.status.code(), Some(1));
    let error = stderr(&output);
    assert!(
        error.contains("lora_A.weight") && error.contains("shape"),
        "{error}"
    );
    assert!(!workshop.path("merged").exists());
}

/// The tensors of an f32 file, in its order.
fn floats(bytes: &[u8]) -> Vec<f32> {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let data = bytes[8 + header..].as_chunks::<4>().0;
    data.iter().map(|b| f32::from_le_bytes(*b)).collect()
}
