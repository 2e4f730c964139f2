//! `generate`: a model writes.

use std::io::{Read, stdin};
use std::time::{Duration, Instant};

use resa_engine::data::Message;
use resa_engine::eval::generate::Progress;
use resa_engine::eval::{Completion, FinishReason, GenerateOptions, Generator, Request};
use resa_engine::{Error, Result};
use serde_json::{Value, json};

use super::Failure;
use super::args::GenerateArgs;
use super::model::Loaded;
use super::output::{note, print, print_line};

pub fn run(args: &GenerateArgs) -> std::result::Result<(), Failure> {
    let options = args.sampling.options(Vec::new(), args.stop.clone());
    let usage = |error: Error| Failure::Usage(error.into());
    options.sampling.check().map_err(usage)?;
    let loaded = Loaded::new(&args.model, &args.with, true)?;
    let mut stop_tokens = args.stop_token.clone();
    if !args.ignore_eos {
        stop_tokens.extend(loaded.tokenizer.end_ids(&loaded.dir)?);
    }
    let options = GenerateOptions {
        stop_tokens,
        ..options
    };
    let requests = requests(args, &loaded)?;
    let inference = loaded.inference();
    let generator = Generator {
        device: &loaded.device,
        inference: &inference,
        tokenizer: &loaded.tokenizer,
        options: &options,
    };
    let mut clock = Clock::new();
    let is_streamed = requests.len() == 1 && !args.json;
    let completions = generator.run(&requests, |progress| {
        match progress {
            Progress::Token(_, text) => {
                clock.token();
                if is_streamed {
                    print(text)?;
                }
            }
            Progress::Done(_, completion) => clock.done(completion),
        }
        Ok(())
    })?;
    let texts = completions.iter().zip(&requests).enumerate();
    for (i, (completion, request)) in texts {
        let prompt = i / args.sampling.samples as usize;
        if args.json {
            print_line(as_json(prompt, request, completion, &clock))?;
        } else if is_streamed {
            print_line("")?;
        } else {
            let (prompt, sample) = (prompt + 1, request.sample + 1);
            print_line(format_args!("--- prompt {prompt}, sample {sample}"))?;
            print_line(&completion.text)?;
        }
    }
    note(clock.summary(&completions));
    Ok(())
}

/// The prompts as token ids, each so many times as samples are asked for.
fn requests(args: &GenerateArgs, loaded: &Loaded) -> Result<Vec<Request>> {
    let chat = match args.raw {
        true => None,
        false => loaded.chat_template()?,
    };
    if chat.is_none() && !args.raw {
        if args.system.is_some() {
            let what = "the model has no chat template that could hold it";
            return Err(Error::setting("--system", what));
        }
        note("note: the model has no chat template, the prompt is given as it is");
    }
    let mut requests = Vec::new();
    for (sequence, prompt) in args.prompt.iter().enumerate() {
        let text = match prompt.as_str() {
            "-" => from_stdin()?,
            text => text.to_owned(),
        };
        let ids = match &chat {
            Some(chat) => {
                let system = args.system.iter().map(|text| Message::system(text));
                let messages: Vec<_> = system.chain([Message::user(&text)]).collect();
                loaded
                    .tokenizer
                    .encode(&chat.render(&messages, true)?, false)?
            }
            None => loaded.tokenizer.encode(&text, true)?,
        };
        loaded.check_prompt(&ids)?;
        requests.extend((0..args.sampling.samples).map(|sample| Request {
            prompt: ids.clone(),
            sequence: sequence as u64,
            sample,
        }));
    }
    Ok(requests)
}

fn from_stdin() -> Result<String> {
    let mut text = String::new();
    let read = stdin().read_to_string(&mut text);
    read.map_err(|e| Error::io("standard input", e))?;
    Ok(text)
}

fn as_json(prompt: usize, request: &Request, completion: &Completion, clock: &Clock) -> Value {
    json!({
        "prompt": prompt,
        "sample": request.sample,
        "prompt_tokens": request.prompt.len(),
        "text": completion.text,
        "tokens": completion.tokens,
        "finish": completion.finish,
        "seconds_to_first_token": clock.first().as_secs_f64(),
        "decode_tokens_per_s": clock.decode_rate(),
    })
}

/// When tokens came.
struct Clock {
    start: Instant,
    first: Option<Instant>,
    last: Instant,
    /// Tokens after the first of all.
    decoded: usize,
}

impl Clock {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            start: now,
            first: None,
            last: now,
            decoded: 0,
        }
    }

    fn token(&mut self) {
        self.last = Instant::now();
        match self.first {
            None => self.first = Some(self.last),
            Some(_) => self.decoded += 1,
        }
    }

    fn done(&mut self, _: &Completion) {
        self.last = Instant::now();
    }

    fn first(&self) -> Duration {
        self.first.unwrap_or(self.last) - self.start
    }

    /// Tokens a second after the first; of several sequences, prompts of later ones included.
    fn decode_rate(&self) -> f64 {
        let seconds = (self.last - self.first.unwrap_or(self.last)).as_secs_f64();
        self.decoded as f64 / seconds.max(1e-9)
    }

    fn summary(&self, completions: &[Completion]) -> String {
        let tokens: usize = completions.iter().map(|c| c.tokens.len()).sum();
        let cut = completions
            .iter()
            .filter(|c| c.finish == FinishReason::Length);
        let cut = match cut.count() {
            0 => String::new(),
            n => format!("; {n} of {} ended at the length limit", completions.len()),
        };
        format!(
            "{tokens} tokens, the first after {:.2} s, then {:.1} tokens/s{cut}",
            self.first().as_secs_f64(),
            self.decode_rate()
        )
    }
}
