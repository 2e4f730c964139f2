//! Text that a model writes, with a key/value cache, for many prompts at a time.

use std::collections::VecDeque;

use rayon::prelude::*;

use crate::data::Tokenizer;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{Inference, Place, Sampling, TextStream};
use crate::ops::decode::KvCache;
use crate::ops::rope::RopeTable;
use crate::tensor::Tensor;

/// Sequences that are decoded together where nothing else is asked for.
pub const BATCH: usize = 16;

/// What to write and when to stop.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// How tokens are drawn.
    pub sampling: Sampling,
    /// Most tokens of a completion.
    pub max_new_tokens: usize,
    /// Tokens that end a completion; they are part of its tokens, as special tokens not of its
    /// text.
    pub stop_tokens: Vec<u32>,
    /// Strings that end a completion; its text ends before them.
    pub stop_strings: Vec<String>,
    /// Most sequences that are decoded together; at least 1.
    pub batch: usize,
}

/// A prompt to go on from.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Number of the prompt, for its draws.
    pub sequence: u64,
    /// Number of the completion among those of the same prompt, for its draws; below 2^24.
    pub sample: u32,
}

/// Why a completion ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// The most new tokens, or the longest sequence that the model was made for.
    Length,
}

/// What a model wrote.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// New tokens, a stop token at the end included.
    pub tokens: Vec<u32>,
    /// Their text without special tokens.
    pub text: String,
    /// Why there is no more.
    pub finish: FinishReason,
}

/// What [`Generator::run`] tells while it works; the first field is the request's place.
pub enum Progress<'a> {
    /// A new token of a completion; the text that is certain now, if any.
    Token(usize, &'a str),
    /// A completion has ended.
    Done(usize, &'a Completion),
}

/// A model with what it takes to let it write.
pub struct Generator<'a> {
    /// Where to compute.
    pub device: &'a Device,
    /// The model.
    pub inference: &'a Inference<'a>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// What to write.
    pub options: &'a GenerateOptions,
}

/// A sequence that is being written.
struct Active<'a> {
    place: usize,
    request: &'a Request,
    cache: KvCache,
    text: TextStream,
    finish: Option<FinishReason>,
}

impl Active<'_> {
    /// What its next draw is for.
    fn next_place(&self) -> Place {
        Place {
            sequence: self.request.sequence,
            sample: self.request.sample,
            position: self.text.tokens().len() as u64,
        }
    }
}

/// The last prompt that was run, for others that are the same.
type Prefilled<'a> = Option<(&'a [u32], KvCache, Tensor)>;

impl Generator<'_> {
    /// The completion of each request, in their order. What `watch` is told comes in the order in
    /// which it happens; an error of it ends the work.
    ///
    /// Prompts are run one by one and join the batch where another sequence has ended, so a
    /// completion does not depend on what is written beside it. (With an SAE inserted its last
    /// digits may: an encoder's product of several rows is rounded otherwise than that of one.)
    ///
    /// # Errors
    /// Settings out of range; a prompt without tokens, longer than the model was made for, or with
    /// ids that it does not have.
    pub fn run(
        &self,
        requests: &[Request],
        mut watch: impl FnMut(Progress) -> Result<()>,
    ) -> Result<Vec<Completion>> {
        let rope = self.check(requests)?;
        let mut waiting: VecDeque<(usize, &Request)> = requests.iter().enumerate().collect();
        let mut active: Vec<Active> = Vec::new();
        let mut prefilled = None;
        let mut done: Vec<Option<Completion>> = requests.iter().map(|_| None).collect();
        loop {
            while active.len() < self.options.batch.max(1)
                && let Some((place, request)) = waiting.pop_front()
            {
                active.push(self.start(place, request, &mut prefilled)?);
            }
            for one in &mut active {
                let finished = one.finish.is_some();
                let text = one.text.take(&self.options.stop_strings, finished);
                watch(Progress::Token(one.place, text))?;
            }
            for one in active.extract_if(.., |one| one.finish.is_some()) {
                let (tokens, text) = one.text.into_parts();
                let finish = one.finish.unwrap_or(FinishReason::Length);
                let completion = Completion {
                    tokens,
                    text,
                    finish,
                };
                watch(Progress::Done(one.place, &completion))?;
                done[one.place] = Some(completion);
            }
            if active.is_empty() && waiting.is_empty() {
                return Ok(done.into_iter().flatten().collect());
            }
            if !active.is_empty() {
                self.step(&mut active, &rope)?;
            }
        }
    }

    /// The rotary table that all sequences need.
    fn check(&self, requests: &[Request]) -> Result<std::sync::Arc<RopeTable>> {
        self.options.sampling.check()?;
        if self.options.stop_strings.iter().any(String::is_empty) {
            return Err(Error::setting("--stop", "expected a text, found nothing"));
        }
        let config = &self.inference.model.config;
        let longest = config.max_position_embeddings;
        for (place, Request { prompt, .. }) in requests.iter().enumerate() {
            if prompt.is_empty() || prompt.len() > longest {
                return Err(Error::operand(
                    "generate",
                    format!("prompts of 1 to {longest} tokens (max_position_embeddings)"),
                    format!("{} tokens in prompt {place}", prompt.len()),
                ));
            }
        }
        let prompt = requests.iter().map(|r| r.prompt.len()).max().unwrap_or(0);
        let positions = prompt
            .saturating_add(self.options.max_new_tokens)
            .min(longest);
        RopeTable::new(positions, config.head_dim, config.rope_theta)
    }

    /// Runs a prompt and draws the first new token.
    fn start<'r>(
        &self,
        place: usize,
        request: &'r Request,
        prefilled: &mut Prefilled<'r>,
    ) -> Result<Active<'r>> {
        if prefilled
            .as_ref()
            .is_none_or(|(prompt, ..)| *prompt != request.prompt)
        {
            let (cache, logits) = self.device.run(|| {
                let (cache, hidden) = self.inference.prefill(self.device, &request.prompt)?;
                let logits = self.inference.logits(self.device, &hidden)?;
                Ok::<_, Error>((cache, logits))
            })?;
            *prefilled = Some((&request.prompt, cache, logits));
        }
        let missing = || Error::operand("generate", "a prompt that was run", "none");
        let (_, cache, logits) = prefilled.as_ref().ok_or_else(missing)?;
        let mut one = Active {
            place,
            request,
            cache: cache.clone(),
            text: TextStream::default(),
            finish: None,
        };
        match self.options.max_new_tokens {
            0 => one.finish = Some(FinishReason::Length),
            _ => {
                let sampling = &self.options.sampling;
                let draw = || sampling.draw(self.device, logits, &[one.next_place()]);
                for token in self.device.run(draw)? {
                    self.push(&mut one, token)?;
                }
            }
        }
        Ok(one)
    }

    /// Draws the next token of each sequence.
    fn step(&self, active: &mut [Active], rope: &RopeTable) -> Result<()> {
        let last = active
            .iter()
            .filter_map(|one| one.text.tokens().last().copied());
        let ids: Vec<u32> = last.collect();
        let places: Vec<Place> = active.iter().map(Active::next_place).collect();
        self.device.run(|| {
            let mut caches: Vec<&mut KvCache> =
                active.iter_mut().map(|one| &mut one.cache).collect();
            let hidden = self.inference.step(self.device, ids, &mut caches, rope)?;
            let logits = self.inference.logits(self.device, &hidden)?;
            let tokens = self.options.sampling.draw(self.device, &logits, &places)?;
            active
                .par_iter_mut()
                .zip(tokens)
                .try_for_each(|(one, token)| self.push(one, token))
        })
    }

    fn push(&self, one: &mut Active, token: u32) -> Result<()> {
        let GenerateOptions {
            max_new_tokens,
            stop_tokens,
            stop_strings,
            ..
        } = self.options;
        let mut stopped = one.text.push(self.tokenizer, token, stop_strings)?;
        stopped |= stop_tokens.contains(&token);
        let tokens = one.text.tokens().len();
        let longest = self.inference.model.config.max_position_embeddings;
        let length = one.request.prompt.len() + tokens;
        if !stopped && (tokens >= *max_new_tokens || length > longest) {
            one.finish = Some(FinishReason::Length);
        }
        if stopped || one.finish.is_some() {
            stopped |= one.text.finish(self.tokenizer, stop_strings)?;
        }
        if stopped {
            one.finish = Some(FinishReason::Stop);
        }
        Ok(())
    }
}
