//! Problems with verifiable answers: what a model writes, graded, and the share it solves.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::data::records::Record;
use crate::data::template::Template;
use crate::data::tokenizer::Tokenizer;
use crate::data::{ChatTemplate, Message};
use crate::device::Device;
use crate::error::Result;
use crate::eval::generate::{BATCH, FinishReason, GenerateOptions, Generator, Progress, Request};
use crate::eval::{Inference, Sampling, answer};

/// One completion for a problem and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Graded {
    /// Place of the problem in the data, from 0.
    pub index: usize,
    /// Number of the completion among those of the problem, from 0.
    pub sample: u32,
    /// The problem as it was asked.
    pub problem: String,
    /// The right answer.
    pub answer: String,
    /// What the model wrote.
    pub completion: String,
    /// The answer found in it.
    pub extracted: Option<String>,
    /// Whether it is the right one.
    pub correct: bool,
    /// New tokens, that of the end included.
    pub tokens: usize,
    /// Why it wrote no more.
    pub finish: FinishReason,
}

/// How a problem is put to a model.
pub enum Asking<'a> {
    /// As in training: EOS, then the template's text up to the answer; `</answer>` ends it.
    Template(&'a Template),
    /// As a message of a user.
    Chat(&'a ChatTemplate),
}

impl Asking<'_> {
    fn prompt(&self, tokenizer: &Tokenizer, record: &Record) -> Result<Vec<u32>> {
        match self {
            Self::Template(template) => {
                let text = format!("{}{}", tokenizer.eos_token(), template.prompt(record)?);
                let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
                ids.extend(tokenizer.encode(&text, false)?);
                Ok(ids)
            }
            Self::Chat(chat) => {
                let message = Message::user(&record.problem);
                tokenizer.encode(&chat.render(&[message], true)?, false)
            }
        }
    }

    /// What ends a completion beside the tokens for it.
    pub fn stop_strings(&self) -> Vec<String> {
        match self {
            Self::Template(_) => vec!["</answer>".to_owned()],
            Self::Chat(_) => Vec::new(),
        }
    }
}

/// A model that solves problems.
pub struct Solver<'a> {
    /// What writes.
    pub generator: Generator<'a>,
    /// How it is asked.
    pub asking: Asking<'a>,
    /// Completions for each problem.
    pub samples: u32,
}

impl Solver<'_> {
    /// Lets the model answer `samples` times every problem but for the completions in `known`
    /// (index and sample), and grades what it says. `graded` is called as each ends.
    ///
    /// # Errors
    /// Those of the generator and of `graded`.
    pub fn solve(
        &self,
        records: &[Record],
        known: &HashSet<(usize, u32)>,
        mut graded: impl FnMut(Graded) -> Result<()>,
    ) -> Result<()> {
        let mut requests = Vec::new();
        for (index, record) in records.iter().enumerate() {
            let missing = (0..self.samples).filter(|&sample| !known.contains(&(index, sample)));
            let missing: Vec<u32> = missing.collect();
            if missing.is_empty() {
                continue;
            }
            let prompt = self.asking.prompt(self.generator.tokenizer, record)?;
            requests.extend(missing.into_iter().map(|sample| Request {
                prompt: prompt.clone(),
                sequence: index as u64,
                sample,
            }));
        }
        self.generator.run(&requests, |progress| {
            let Progress::Done(place, completion) = progress else {
                return Ok(());
            };
            let Request {
                sequence, sample, ..
            } = requests[place];
            let record = &records[sequence as usize];
            let (extracted, correct) = grade(&completion.text, &record.answer);
            graded(Graded {
                index: sequence as usize,
                sample,
                problem: record.problem.clone(),
                answer: record.answer.clone(),
                completion: completion.text.clone(),
                extracted,
                correct,
                tokens: completion.tokens.len(),
                finish: completion.finish,
            })
        })?;
        Ok(())
    }
}

/// The answer that a completion gives, and whether it is the right one.
pub fn grade(completion: &str, right: &str) -> (Option<String>, bool) {
    let extracted = answer::extract(completion).map(str::to_owned);
    let correct = extracted.as_ref().is_some_and(|e| answer::equal(right, e));
    (extracted, correct)
}

/// Lets the model answer every problem, greedily, from the template's prompt on, until an EOS
/// token or `</answer>`, and grades what it says; in the order of the records.
pub fn greedy_answers(
    device: &Device,
    inference: &Inference,
    tokenizer: &Tokenizer,
    template: &Template,
    records: &[Record],
    max_new_tokens: usize,
) -> Result<Vec<Graded>> {
    let asking = Asking::Template(template);
    let options = GenerateOptions {
        sampling: Sampling::greedy(),
        max_new_tokens,
        stop_tokens: vec![tokenizer.eos_id()],
        stop_strings: asking.stop_strings(),
        batch: BATCH,
    };
    let solver = Solver {
        generator: Generator {
            device,
            inference,
            tokenizer,
            options: &options,
        },
        asking,
        samples: 1,
    };
    let mut all = Vec::new();
    solver.solve(records, &HashSet::new(), |graded| {
        all.push(graded);
        Ok(())
    })?;
    all.sort_by_key(|graded| graded.index);
    Ok(all)
}

/// The share of right answers.
pub fn pass_at_1(graded: &[Graded]) -> f64 {
    graded.iter().filter(|g| g.correct).count() as f64 / graded.len().max(1) as f64
}

/// An estimate of a share with its 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean over problems.
    pub value: f64,
    /// Where the interval begins.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
}

impl Estimate {
    /// How the interval of [`pass_at_k`] is made for these problems.
    pub fn interval_name(counts: &[(u64, u64)]) -> &'static str {
        match counts.iter().all(|&(n, _)| n == 1) {
            true => "Wilson score",
            false => "normal approximation over problems",
        }
    }
}

/// Number of completions and of right ones, for each problem.
pub fn counts<'a>(graded: impl IntoIterator<Item = &'a Graded>) -> Vec<(u64, u64)> {
    let mut counts: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
    for one in graded {
        let (completions, right) = counts.entry(one.index).or_default();
        *completions += 1;
        *right += u64::from(one.correct);
    }
    counts.into_values().collect()
}

/// The probability that at least one of k completions is right, by the unbiased estimator of Chen
/// et al. 2021 (arXiv 2107.03374): 1 − C(n − c, k) / C(n, k) for a problem of whose n completions
/// c are right, and its mean over problems. `None` where some problem has fewer than k.
///
/// The interval is that of Wilson (1927) where each problem has one completion, which is either
/// right or wrong; else the mean ± 1.96 standard errors over problems, which are what varies
/// (Miller 2024, arXiv 2411.00640), within 0 and 1.
pub fn pass_at_k(counts: &[(u64, u64)], k: u64) -> Option<Estimate> {
    if k == 0 || counts.is_empty() || counts.iter().any(|&(n, _)| n < k) {
        return None;
    }
    let shares: Vec<f64> = counts.iter().map(|&(n, c)| any_of(n, c, k)).collect();
    let n = shares.len() as f64;
    let value = shares.iter().sum::<f64>() / n;
    let half_width = 1.959_963_984_540_054;
    if counts.iter().all(|&(n, _)| n == 1) {
        let z2 = half_width * half_width;
        let centre = (value + z2 / (2.0 * n)) / (1.0 + z2 / n);
        let spread =
            half_width / (1.0 + z2 / n) * (value * (1.0 - value) / n + z2 / (4.0 * n * n)).sqrt();
        let (low, high) = ((centre - spread).max(0.0), (centre + spread).min(1.0));
        return Some(Estimate { value, low, high });
    }
    let variance = shares.iter().map(|s| (s - value).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let spread = half_width * (variance / n).sqrt();
    Some(Estimate {
        value,
        low: (value - spread).max(0.0),
        high: (value + spread).min(1.0),
    })
}

/// 1 − C(n − c, k) / C(n, k).
fn any_of(n: u64, c: u64, k: u64) -> f64 {
    if n.saturating_sub(c) < k {
        return 1.0;
    }
    1.0 - (n - c + 1..=n)
        .map(|i| 1.0 - k as f64 / i as f64)
        .product::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pass_at_k_is_the_share_of_draws_with_a_right_completion() {
        // Against all draws of k of n completions, counted one by one.
        for n in 1..=8u64 {
            for c in 0..=n {
                for k in 1..=n {
                    let draws = (0..1u64 << n).filter(|draw| u64::from(draw.count_ones()) == k);
                    let (mut all, mut hits) = (0.0, 0.0);
                    for draw in draws {
                        all += 1.0;
                        hits += f64::from(u8::from(draw & ((1 << c) - 1) != 0));
                    }
                    let found = any_of(n, c, k);
                    assert!((found - hits / all).abs() < 1e-12, "{n} {c} {k}: {found}");
                }
            }
        }
    }

    #[test]
    fn the_interval_is_wilsons_for_one_completion_and_the_normal_one_for_several() {
        let ones: Vec<(u64, u64)> = (0..20).map(|i| (1, u64::from(i < 15))).collect();
        let estimate = pass_at_k(&ones, 1).unwrap();
        // Computed in Python from the formula for 15 of 20.
        assert_eq!(estimate.value, 0.75);
        assert!((estimate.low - 0.531_299_2).abs() < 1e-6, "{estimate:?}");
        assert!((estimate.high - 0.888_138_3).abs() < 1e-6, "{estimate:?}");

        // Shares 0, 1/2, 1, 1/2: mean 1/2, standard error sqrt(1/6 / 4).
        let twos = [(2, 0), (2, 1), (2, 2), (2, 1)];
        let estimate = pass_at_k(&twos, 1).unwrap();
        let spread = 1.959_964 * (1.0f64 / 6.0 / 4.0).sqrt();
        assert!((estimate.low - (0.5 - spread)).abs() < 1e-6, "{estimate:?}");
        assert!(
            (estimate.high - (0.5 + spread)).abs() < 1e-6,
            "{estimate:?}"
        );
        assert_eq!(pass_at_k(&twos, 2).unwrap().value, 0.75);
        assert_eq!(pass_at_k(&twos, 3), None);
        assert_eq!(pass_at_k(&[], 1), None);
    }
}
