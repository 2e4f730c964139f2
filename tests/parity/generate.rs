//! Generation with a key/value cache against the forward pass without one.

use std::path::{Path, PathBuf};

use resa_engine::data::Tokenizer;
use resa_engine::device::Device;
use resa_engine::eval::generate::Progress;
use resa_engine::eval::{
    Completion, FinishReason, GenerateOptions, Generator, Inference, Request, Sampling,
};
use resa_engine::formats::{huggingface, peft};
use resa_engine::model::{Layout, Sae, SaeConfig};
use resa_engine::ops::Operator;
use resa_engine::ops::gemm::Linear;
use resa_engine::tape::Tape;
use resa_engine::tensor::Tensor;

use crate::golden::{assert_close, golden, path, tensor};

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/example/target")
}

fn logits_of(device: &Device, inference: &Inference, hidden: Tensor) -> Tensor {
    let weight = inference.model.lm_head.clone();
    let head = Linear { weight, bias: None };
    let (logits, _) = head.forward(device, &[&hidden], &[false]).unwrap();
    logits.into_iter().next().unwrap()
}

/// The last of the logits of a whole forward pass over a sequence, \[1, V\].
fn without_cache(device: &Device, inference: &Inference, ids: &[u32]) -> Tensor {
    let layout = Layout::new(&inference.model.config, 1, ids.len()).unwrap();
    let hidden = Tensor::from_u32(ids.to_vec(), [ids.len()]).unwrap();
    let hidden = inference.hidden(device, hidden, &layout).unwrap();
    let logits = logits_of(device, inference, hidden);
    let vocab = logits.shape()[1];
    let last = logits.f32s().unwrap()[(ids.len() - 1) * vocab..].to_vec();
    Tensor::from_vec(last, [1, vocab]).unwrap()
}

/// Feeds two sequences token by token behind their first tokens, side by side, and compares the
/// logits after each with those of a whole forward pass.
fn check_steps(inference: &Inference, tolerance: f64) {
    let device = Device::cpu(2).unwrap();
    let bytes = golden("golden.safetensors");
    let ids = tensor(&bytes, "input_ids");
    let ids = ids.u32s().unwrap();
    let (first, second) = (&ids[..30], &ids[48..90]);
    let (mut a, _) = inference.prefill(&device, &first[..20]).unwrap();
    let (mut b, hidden) = inference.prefill(&device, &second[..32]).unwrap();
    let logits = inference.logits(&device, &hidden).unwrap();
    let want = without_cache(&device, inference, &second[..32]);
    assert_close("prefill", &logits, &want, tolerance);
    let config = &inference.model.config;
    let rope =
        resa_engine::ops::rope::RopeTable::new(48, config.head_dim, config.rope_theta).unwrap();
    for step in 0..10 {
        let next = vec![first[20 + step], second[32 + step]];
        let hidden = inference
            .step(&device, next, &mut [&mut a, &mut b], &rope)
            .unwrap();
        let logits = inference.logits(&device, &hidden).unwrap();
        let vocab = config.vocab_size;
        for (row, ids) in [&first[..21 + step], &second[..33 + step]]
            .into_iter()
            .enumerate()
        {
            let got = logits.f32s().unwrap()[row * vocab..][..vocab].to_vec();
            let got = Tensor::from_vec(got, [1, vocab]).unwrap();
            let want = without_cache(&device, inference, ids);
            assert_close(
                &format!("step {step}, sequence {row}"),
                &got,
                &want,
                tolerance,
            );
        }
    }
    assert_eq!((a.tokens(0), b.tokens(3)), (30, 42));
}

#[test]
fn decoding_with_a_cache_gives_the_logits_of_a_whole_forward_pass() {
    let model = huggingface::load(&path("model")).unwrap();
    check_steps(&Inference::new(&model), 1e-5);
}

#[test]
fn adapters_act_while_decoding() {
    let model = huggingface::load(&path("model")).unwrap();
    let lora = peft::load(&path("lora"), &model.config).unwrap();
    let inference = Inference {
        adapters: Some(&lora),
        ..Inference::new(&model)
    };
    check_steps(&inference, 1e-5);
    let device = Device::cpu(1).unwrap();
    let ids: Vec<u32> = (5..25).collect();
    let with = without_cache(&device, &inference, &ids);
    let alone = without_cache(&device, &Inference::new(&model), &ids);
    assert_ne!(with.f32s().unwrap(), alone.f32s().unwrap());
}

#[test]
fn an_inserted_sae_acts_while_decoding() {
    let device = Device::cpu(1).unwrap();
    let model = huggingface::load(&path("model")).unwrap();
    // All latents active: no near tie between two of them can turn with rounding.
    let config = SaeConfig::new(model.config.hidden_size, 96, 96);
    let sae = Sae::scratch(&device, config, 3, 0).unwrap();
    let inference = Inference {
        sae: Some((&sae, 1)),
        ..Inference::new(&model)
    };
    check_steps(&inference, 1e-5);
}

#[test]
fn a_prefill_takes_one_sequence_and_an_empty_cache() {
    let device = Device::cpu(1).unwrap();
    let model = huggingface::load(&path("model")).unwrap();
    let mut cache = model.cache(&device);
    let mut prefill = |batch| {
        let layout = Layout::new(&model.config, batch, 4).unwrap();
        let mut tape = Tape::new(&device);
        let ids = Tensor::from_u32(vec![5; 4 * batch], [4 * batch]).unwrap();
        let x = model.embed(&mut tape, ids).unwrap();
        model.prefill(&mut tape, x, 0..2, &layout, None, &mut cache)
    };
    let error = prefill(2).unwrap_err().to_string();
    assert!(error.contains("one sequence"), "{error}");
    prefill(1).unwrap();
    let error = prefill(1).unwrap_err().to_string();
    assert!(error.contains("a cache of 4"), "{error}");
}

struct Writer {
    device: Device,
    model: resa_engine::model::Qwen2,
    tokenizer: Tokenizer,
}

impl Writer {
    fn new(threads: usize) -> Self {
        Self {
            device: Device::cpu(threads).unwrap(),
            model: huggingface::load(&example()).unwrap(),
            tokenizer: Tokenizer::from_dir(example()).unwrap(),
        }
    }

    fn ids(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode(text, true).unwrap()
    }

    fn run(
        &self,
        options: &GenerateOptions,
        requests: &[Request],
    ) -> (Vec<Completion>, Vec<String>) {
        let generator = Generator {
            device: &self.device,
            inference: &Inference::new(&self.model),
            tokenizer: &self.tokenizer,
            options,
        };
        let mut streamed = vec![String::new(); requests.len()];
        let completions = generator.run(requests, |progress| {
            if let Progress::Token(place, text) = progress {
                streamed[place].push_str(text);
            }
            Ok(())
        });
        (completions.unwrap(), streamed)
    }
}

fn options(temperature: f32, max_new_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: Sampling {
            temperature,
            ..Sampling::greedy()
        },
        max_new_tokens,
        stop_tokens: Vec::new(),
        stop_strings: Vec::new(),
        batch: 16,
    }
}

fn requests(writer: &Writer) -> Vec<Request> {
    let texts = [
        "What is 72 + 97?",
        "Tom has 32 nuts",
        "1",
        "What is 83 - 3? Let us see: ",
    ];
    let numbered = texts
        .iter()
        .enumerate()
        .flat_map(|(i, text)| (0..3).map(move |sample| (i as u64, sample, text)));
    numbered
        .map(|(sequence, sample, text)| Request {
            prompt: writer.ids(text),
            sequence,
            sample,
        })
        .collect()
}

#[test]
fn greedy_tokens_are_those_of_whole_forward_passes() {
    let writer = Writer::new(2);
    let request = &requests(&writer)[0];
    let (completions, _) = writer.run(&options(0.0, 12), std::slice::from_ref(request));
    let mut ids = request.prompt.clone();
    for &token in &completions[0].tokens {
        let logits = without_cache(&writer.device, &Inference::new(&writer.model), &ids);
        let row = logits.f32s().unwrap();
        let best = (0..row.len())
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap();
        assert_eq!(token as usize, best);
        ids.push(token);
    }
    assert_eq!(completions[0].tokens.len(), 12);
}

#[test]
fn what_is_sampled_does_not_depend_on_what_is_written_beside_it() {
    let (writer, alone) = (Writer::new(3), Writer::new(1));
    let requests = requests(&writer);
    let (together, _) = writer.run(&options(1.5, 20), &requests);
    for batch in [1, 5] {
        let options = GenerateOptions {
            batch,
            ..options(1.5, 20)
        };
        assert_eq!(
            alone.run(&options, &requests).0,
            together,
            "batch of {batch}"
        );
    }
    let (last, _) = writer.run(&options(1.5, 20), &requests[7..8]);
    assert_eq!(last[0], together[7]);
    // Samples of one prompt differ from each other, and other seeds from these.
    assert_ne!(together[0].tokens, together[1].tokens);
    let mut other = options(1.5, 20);
    other.sampling.seed = 1;
    assert_ne!(writer.run(&other, &requests).0, together);
}

#[test]
fn a_completion_ends_at_a_stop_token_a_stop_string_or_its_length() {
    let writer = Writer::new(2);
    let request = [requests(&writer).swap_remove(0)];
    let (all, streamed) = writer.run(&options(0.0, 24), &request);
    let text = all[0].text.clone();
    assert_eq!((all[0].finish, &streamed[0]), (FinishReason::Length, &text));
    assert!(text.len() > 8, "{text:?}");

    // A string from the middle, which lies across tokens.
    let stop: String = text.chars().skip(5).take(3).collect();
    let stopping = GenerateOptions {
        stop_strings: vec!["not there".to_owned(), stop.clone()],
        ..options(0.0, 24)
    };
    let (stopped, streamed) = writer.run(&stopping, &request);
    assert_eq!(stopped[0].finish, FinishReason::Stop);
    assert_eq!(stopped[0].text, text[..text.find(&stop).unwrap()]);
    assert_eq!(streamed[0], stopped[0].text);

    let token = all[0].tokens[3];
    let end = all[0].tokens.iter().position(|&t| t == token).unwrap();
    let stopping = GenerateOptions {
        stop_tokens: vec![token],
        ..options(0.0, 24)
    };
    let (stopped, _) = writer.run(&stopping, &request);
    assert_eq!(stopped[0].tokens, all[0].tokens[..=end]);
    assert_eq!(stopped[0].finish, FinishReason::Stop);
}

#[test]
fn a_sequence_ends_where_the_model_has_no_more_positions() {
    let mut writer = Writer::new(1);
    writer.model.config.max_position_embeddings = 20;
    let prompt = vec![7; 18];
    let request = |prompt| Request {
        prompt,
        sequence: 0,
        sample: 0,
    };
    let (completions, _) = writer.run(&options(0.0, 1 << 40), &[request(prompt)]);
    // The last one is not looked at any more.
    assert_eq!(completions[0].tokens.len(), 3);
    let (inference, options) = (Inference::new(&writer.model), options(0.0, 5));
    let generator = Generator {
        device: &writer.device,
        inference: &inference,
        tokenizer: &writer.tokenizer,
        options: &options,
    };
    for (prompt, what) in [
        (vec![7; 21], "21 tokens"),
        (vec![], "0 tokens"),
        (vec![9999], "9999"),
    ] {
        let error = generator
            .run(&[request(prompt)], |_| Ok(()))
            .unwrap_err()
            .to_string();
        assert!(error.contains(what), "{error}");
    }
}
