//! What is given to `generate` has its effect: prompts, what ends a text, chat templates, adapters.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use resa_engine::data::Tokenizer;
use resa_engine::eval::Inference;
use resa_engine::formats::{huggingface, peft};
use resa_engine::model::Layout;
use resa_engine::{Device, Tensor};
use serde_json::{Value, json};

use super::support::{Workshop, copy_dir, fixture, stderr};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// What a model writes greedily after `prompt`, without a cache: all of it is read anew for each
/// token.
pub fn greedy(inference: &Inference, prompt: &[u32], count: usize) -> Vec<u32> {
    let device = Device::cpu(2).unwrap();
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let layout = Layout::new(&inference.model.config, 1, ids.len()).unwrap();
        let input = Tensor::from_u32(ids.clone(), [ids.len()]).unwrap();
        let hidden = inference.hidden(&device, input, &layout).unwrap();
        let last = hidden
            .f32s()
            .unwrap()
            .chunks(inference.model.config.hidden_size);
        let last = last.last().unwrap().to_vec();
        let last = Tensor::from_vec(last, [1, inference.model.config.hidden_size]).unwrap();
        let logits = inference.logits(&device, &last).unwrap();
        let logits = logits.f32s().unwrap().iter().enumerate();
        ids.push(logits.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32);
    }
    ids.split_off(prompt.len())
}

/// The example's target with a chat template.
fn chat_model(workshop: &Workshop) {
    copy_dir(&fixture("example/target"), &workshop.path("chat"));
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}Assistant: <think>{% endif %}";
    fs::write(workshop.path("chat/chat_template.jinja"), template).unwrap();
}

/// The first line that `generate` of 12 tokens prints greedily as JSON, with `more`.
fn written(workshop: &Workshop, model: &str, more: &[&str]) -> Value {
    let args = ["generate", "--model", model, "--temperature", "0", "--json"];
    let printed = workshop.prints(&[&args[..], &["--max-new-tokens", "12"], more].concat());
    let mut line: Value = serde_json::from_str(printed.lines().next().unwrap()).unwrap();
    let object = line.as_object_mut().unwrap();
    for time in ["seconds_to_first_token", "decode_tokens_per_s"] {
        object.shift_remove(time).unwrap();
    }
    line
}

#[test]
fn a_prompt_is_read_from_standard_input() {
    let workshop = Workshop::new(1);
    let model = text(&fixture("example/target"));
    let want = written(&workshop, &model, &["--prompt", "What is 7 + 8?", "--raw"]);
    let args = [
        "generate",
        "--model",
        &model,
        "--temperature",
        "0",
        "--json",
    ];
    let more = ["--max-new-tokens", "12", "--raw", "--prompt", "-"];
    let mut command = workshop.command(&[&args[..], &more].concat());
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"What is 7 + 8?")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    for key in ["prompt_tokens", "tokens", "text", "finish"] {
        assert_eq!(found[key], want[key], "{key}");
    }
}

#[test]
fn a_stop_text_is_left_out_and_a_stop_token_is_the_last() {
    let workshop = Workshop::new(1);
    let model = text(&fixture("example/target"));
    let run = |more: &[&str]| {
        let prompt = ["--prompt", "What is 7 + 8?", "--raw", "--ignore-eos"];
        written(&workshop, &model, &[&prompt[..], more].concat())
    };
    let whole = run(&[]);
    assert_eq!(whole["finish"], "length");
    let all = whole["text"].as_str().unwrap();
    let stop: String = all.chars().skip(5).take(2).collect();
    let found = run(&["--stop", "not in it", &format!("--stop={stop}")]);
    let end = all.find(&stop).unwrap();
    assert_eq!(
        (&found["text"], &found["finish"]),
        (&json!(all[..end]), &json!("stop"))
    );

    let all = whole["tokens"].as_array().unwrap();
    let found = run(&["--stop-token", &all[5].to_string()]);
    let end = all.iter().position(|id| *id == all[5]).unwrap();
    assert_eq!(
        (&found["tokens"], &found["finish"]),
        (&json!(all[..=end]), &json!("stop"))
    );
}

#[test]
fn the_chat_template_holds_the_prompt_and_what_the_model_is_told_beforehand() {
    let workshop = Workshop::new(1);
    chat_model(&workshop);
    for (chat, whole) in [
        (
            &["--prompt", "2 + 3", "--system", "Be brief."][..],
            "system: Be brief.\nuser: 2 + 3\nAssistant: <think>",
        ),
        (&["--prompt", "2 + 3"], "user: 2 + 3\nAssistant: <think>"),
    ] {
        let want = written(&workshop, "chat", &["--raw", "--prompt", whole]);
        assert_eq!(written(&workshop, "chat", chat), want);
    }
}

#[test]
fn a_chat_model_is_evaluated_on_problems_in_its_chat_template() {
    let workshop = Workshop::new(3);
    chat_model(&workshop);
    let args = ["eval", "--model", "chat", "--data", "data.jsonl", "--chat"];
    let more = [
        "--temperature",
        "0",
        "--max-new-tokens",
        "12",
        "--out",
        "out",
    ];
    workshop.prints(&[&args[..], &more].concat());
    let found = fs::read_to_string(workshop.path("out")).unwrap();
    let found: Vec<Value> = found
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(found.len(), 3);
    for line in &found {
        let problem = line["problem"].as_str().unwrap();
        let want = written(&workshop, "chat", &["--prompt", problem]);
        assert_eq!(line["completion"], want["text"], "{problem}");
        assert_eq!(line["settings"]["prompt"], "the model's chat template");
    }
    let plain = text(&fixture("example/target"));
    let output = workshop.resa(&[&["eval", "--model", &plain], &args[3..]].concat());
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--chat"), "{}", stderr(&output));
}

#[test]
fn a_model_writes_with_its_adapter() {
    let workshop = Workshop::new(22);
    let tuned = ["--method", "sft", "--epochs", "1", "--lr", "0.01"];
    workshop.train("run", &tuned);
    let dir = fixture("example/target");
    let (prompt, model) = ("What is 7 + 8?", huggingface::load(&dir).unwrap());
    let lora = peft::load(&workshop.path("run/adapter"), &model.config).unwrap();
    let ids = Tokenizer::from_dir(&dir)
        .unwrap()
        .encode(prompt, true)
        .unwrap();
    let run = |more: &[&str]| {
        let prompt = ["--prompt", prompt, "--raw", "--ignore-eos"];
        written(&workshop, &text(&dir), &[&prompt[..], more].concat())["tokens"].clone()
    };
    let (alone, tuned) = (run(&[]), run(&["--adapter", "run/adapter"]));
    let mut inference = Inference::new(&model);
    assert_eq!(alone, json!(greedy(&inference, &ids, 12)));
    inference.adapters = Some(&lora);
    assert_eq!(tuned, json!(greedy(&inference, &ids, 12)));
    assert_ne!(alone, tuned);
}
