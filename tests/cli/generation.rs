//! Text that is written on CUDA: on a GPU where there is one, else on the emulator, which also
//! takes the driver's place for the program itself.

use std::path::Path;
use std::process::Output;

use resa_engine::Device;
use resa_engine::data::Tokenizer;
use resa_engine::eval::{Completion, GenerateOptions, Generator, Inference, Request, Sampling};
use resa_engine::formats::huggingface;
use resa_engine::model::Qwen2;
use resa_engine::ops::decode::KvCache;
use resa_engine::ops::rope::RopeTable;
use resa_engine::tensor::Tensor;
use resa_engine::train::DtypeSetting;
use resa_engine::train::inputs::prepare;
use serde_json::Value;

use super::cuda::cuda_is_there;
use super::support::{Workshop, fixture, stderr};

fn model(device: &Device) -> Qwen2 {
    let mut model = huggingface::load(&fixture("example/source")).unwrap();
    let layers = 0..model.layers.len();
    device
        .run(|| prepare(device, &mut model, DtypeSetting::Auto, layers, true))
        .unwrap();
    model
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(fixture("example/source")).unwrap()
}

/// Token ids of the first problems that the example's model is asked.
fn prompts(count: usize) -> Vec<Vec<u32>> {
    let text = std::fs::read_to_string(fixture("example/problems.jsonl")).unwrap();
    let problems = text.lines().take(count).map(|line| {
        let record: Value = serde_json::from_str(line).unwrap();
        record["problem"].as_str().unwrap().to_owned()
    });
    problems
        .map(|text| tokenizer().encode(&text, true).unwrap())
        .collect()
}

fn largest(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.unwrap().0 as u32
}

/// Logits after the prompt and after each token but the last that follows it: `next` gives them,
/// told the logits so far.
fn logits_of(
    device: &Device,
    model: &Qwen2,
    prompt: &[u32],
    count: usize,
    mut next: impl FnMut(usize, &[f32]) -> u32 + Send,
) -> Vec<Vec<f32>> {
    let inference = Inference::new(model);
    let config = &model.config;
    let rope = RopeTable::new(prompt.len() + count, config.head_dim, config.rope_theta).unwrap();
    device.run(|| {
        let (mut cache, mut hidden) = inference.prefill(device, prompt).unwrap();
        let mut all = Vec::new();
        for i in 0..count {
            let logits: Tensor = inference.logits(device, &hidden).unwrap();
            let logits = logits.to_f32().unwrap();
            all.push(logits.f32s().unwrap().to_vec());
            let token = next(i, &all[i]);
            let mut caches: [&mut KvCache; 1] = [&mut cache];
            hidden = inference
                .step(device, vec![token], &mut caches, &rope)
                .unwrap();
        }
        all
    })
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum()
}

#[test]
fn logits_on_cuda_are_those_of_the_cpu_as_far_as_bf16_goes_and_tokens_where_they_are_clear() {
    if !cuda_is_there() {
        return;
    }
    const TOKENS: usize = 12;
    let (cpu, cuda) = (Device::cpu(2).unwrap(), Device::cuda(0, 2).unwrap());
    let (on_cpu, on_cuda) = (model(&cpu), model(&cuda));
    let prompt = prompts(1).swap_remove(0);
    let mut tokens = Vec::new();
    let want = logits_of(&cpu, &on_cpu, &prompt, TOKENS, |_, logits| {
        tokens.push(largest(logits));
        tokens[tokens.len() - 1]
    });
    let got = logits_of(&cuda, &on_cuda, &prompt, TOKENS, |i, _| tokens[i]);
    // What bf16 costs: the same by the kernels of training, which know no cache.
    let inference = Inference::new(&on_cuda);
    let whole = cuda.run(|| {
        let logits = (0..TOKENS).map(|i| {
            let ids = [&prompt[..], &tokens[..i]].concat();
            let (_, hidden) = inference.prefill(&cuda, &ids).unwrap();
            let logits = inference.logits(&cuda, &hidden).unwrap();
            logits.to_f32().unwrap().f32s().unwrap().to_vec()
        });
        logits.collect::<Vec<_>>()
    });
    let error = |found: &[Vec<f32>]| {
        let squares = found.iter().zip(&want).map(|(f, w)| distance(f, w));
        let norms = want.iter().map(|w| distance(w, &vec![0.0; w.len()]));
        (squares.sum::<f64>() / norms.sum::<f64>()).sqrt()
    };
    let (stepped, at_once) = (error(&got), error(&whole));
    println!("logits are off by {stepped:.2e} step by step, by {at_once:.2e} at once");
    assert!(stepped < 2.0 * at_once, "{stepped:e}, at once {at_once:e}");
    let mut clear = 0;
    for (i, want) in want.iter().enumerate() {
        let off = want.iter().zip(&whole[i]).map(|(a, b)| (a - b).abs());
        let off = off.fold(0.0, f32::max);
        let mut sorted = want.clone();
        sorted.sort_by(|a, b| b.total_cmp(a));
        if sorted[0] - sorted[1] > 4.0 * off {
            clear += 1;
            assert_eq!(largest(&got[i]), tokens[i], "token {i}");
        }
    }
    println!("{clear} of {TOKENS} tokens are clear");
    assert!(clear >= TOKENS / 2, "{clear}");
}

#[test]
fn what_is_written_on_cuda_does_not_depend_on_what_is_written_beside_it() {
    if !cuda_is_there() {
        return;
    }
    let device = Device::cuda(0, 2).unwrap();
    let (model, tokenizer) = (model(&device), tokenizer());
    let requests: Vec<Request> = prompts(3)
        .into_iter()
        .enumerate()
        .flat_map(|(i, prompt)| {
            [0, 1].map(|sample| Request {
                prompt: prompt.clone(),
                sequence: i as u64,
                sample,
            })
        })
        .collect();
    let write = |batch: usize| -> Vec<Completion> {
        let options = GenerateOptions {
            sampling: Sampling {
                // The example's model is sure of itself: at 1 all draws are the same.
                temperature: 3.0,
                top_p: 0.95,
                top_k: 50,
                seed: 3,
            },
            max_new_tokens: 6,
            stop_tokens: Vec::new(),
            stop_strings: Vec::new(),
            batch,
        };
        let generator = Generator {
            device: &device,
            inference: &Inference::new(&model),
            tokenizer: &tokenizer,
            options: &options,
        };
        generator.run(&requests, |_| Ok(())).unwrap()
    };
    let alone = write(1);
    assert_eq!(alone.len(), 6);
    assert!(alone.iter().all(|c| c.tokens.len() == 6));
    assert_ne!(alone[0].tokens, alone[1].tokens);
    assert_eq!(write(4), alone);
}

/// The program with the emulator, as `device` or as if there were none, in the driver's place.
#[cfg(unix)]
fn emulated(workshop: &Workshop, device: &str, args: &[&str]) -> Output {
    let folder = workshop.path("driver");
    if !folder.is_dir() {
        let beside = std::env::current_exe().unwrap();
        let library = beside.with_file_name("libcuda_emulator.so");
        let library = std::env::var_os("CUDA_EMU_LIBRARY").map_or(library, Into::into);
        std::fs::create_dir(&folder).unwrap();
        for name in ["libcuda.so", "libcuda.so.1"] {
            std::os::unix::fs::symlink(&library, folder.join(name)).unwrap();
        }
    }
    let mut command = workshop.command(args);
    command.env("LD_LIBRARY_PATH", folder);
    command.env("CUDA_EMU_DEVICE", device).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[cfg(unix)]
#[test]
fn generate_and_eval_run_on_cuda() {
    if !cuda_is_there() {
        return;
    }
    let workshop = Workshop::new(1);
    let (source, data) = (fixture("example/source"), fixture("example/eval.jsonl"));
    let template = fixture("example/template.jinja");
    let model = ["--model", text(&source), "--device", "cuda"];
    let printed = |args: &[&str]| -> Value {
        let output = emulated(&workshop, "a100", args);
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let greedy = ["--temperature", "0", "--max-new-tokens", "5", "--json"];
    let prompt = ["generate", "--prompt", "2 + 3", "--raw"];
    let written = printed(&[&prompt[..], &model, &greedy].concat());
    assert_eq!(written["tokens"].as_array().unwrap().len(), 5);
    let drawn = |seed: &str| {
        let hot = ["--temperature", "3", "--top-k", "90", "--top-p", "0.95"];
        let rest = ["--seed", seed, "--max-new-tokens", "5", "--json"];
        printed(&[&prompt[..], &model, &hot, &rest].concat())["tokens"].clone()
    };
    assert_eq!(drawn("1"), drawn("1"));
    assert_ne!(drawn("1"), drawn("2"));

    let answers = ["--data", text(&data), "--template", text(&template)];
    let few = ["--limit", "2", "--samples", "1"];
    let graded = printed(&[&["eval"], &model[..], &answers, &greedy, &few].concat());
    assert_eq!(graded["completions"], 2);

    let loss = ["--perplexity", "--seq-len", "64", "--limit", "2", "--json"];
    let nll = |device: &str| {
        let model = ["--model", text(&source), "--device", device];
        let result = printed(&[&["eval"], &model[..], &answers, &loss].concat());
        result["mean_nll"].as_f64().unwrap()
    };
    let (on_cuda, on_cpu) = (nll("cuda"), nll("cpu"));
    // bf16 keeps 8 bits; the mean of a hundred tokens is nearer than that.
    assert!((on_cuda / on_cpu - 1.0).abs() < 0.01, "{on_cuda} {on_cpu}");
}

#[cfg(unix)]
#[test]
fn what_a_machine_lacks_for_cuda_is_said_by_the_program() {
    if !cuda_is_there() {
        return;
    }
    let workshop = Workshop::new(1);
    let source = fixture("example/source");
    let generate = |device: &str, more: &[&str]| {
        let args = ["generate", "--prompt", "1", "--model", text(&source)];
        let output = emulated(&workshop, device, &[&args[..], more].concat());
        assert!(!output.status.success());
        stderr(&output)
    };
    for (device, more, what) in [
        (
            "v100",
            &["--device", "cuda"][..],
            "expected compute capability 8.0 or later, found 7.0",
        ),
        ("none", &["--device", "cuda"], "finds no GPU"),
        (
            "a100",
            &["--device", "cuda:7"],
            "the driver has 1 devices, numbered from 0",
        ),
        (
            "a100",
            &["--device", "cuda", "--dtype", "f32"],
            "expected bf16 or auto on a GPU, found f32",
        ),
    ] {
        let error = generate(device, more);
        assert!(error.contains(what), "{error}");
    }
    // Without the emulator on its path the program has the machine's driver, if there is one.
    if cuda_emulator::install() == Ok(cuda_emulator::Backend::Emulator) {
        let args = ["generate", "--prompt", "1", "--model", text(&source)];
        let output = workshop.resa(&[&args[..], &["--device", "cuda"]].concat());
        assert_eq!(output.status.code(), Some(1));
        let error = stderr(&output);
        assert!(
            error.contains("no CUDA driver (libcuda) is installed"),
            "{error}"
        );
    }
}
