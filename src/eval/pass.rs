//! Pass@1: the share of problems whose greedy answer is right.

use crate::data::records::Record;
use crate::data::template::Template;
use crate::data::tokenizer::Tokenizer;
use crate::device::Device;
use crate::error::Result;
use crate::eval::{Inference, answer, generate};

/// What became of one problem.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Graded {
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
}

/// Lets the model answer every problem, greedily, from the template's prompt on, until an EOS
/// token or `</answer>`, and grades what it says.
pub fn greedy_answers(
    device: &Device,
    inference: &Inference,
    tokenizer: &Tokenizer,
    template: &Template,
    records: &[Record],
    max_new_tokens: usize,
) -> Result<Vec<Graded>> {
    let prompts = records
        .iter()
        .map(|record| {
            // As in training, a text begins with EOS.
            let text = format!("{}{}", tokenizer.eos_token(), template.prompt(record)?);
            let mut ids: Vec<u32> = tokenizer.bos().into_iter().collect();
            ids.extend(tokenizer.encode(&text, false)?);
            Ok(ids)
        })
        .collect::<Result<Vec<_>>>()?;
    let eos = tokenizer.eos_id();
    let finished = |new: &[u32]| {
        Ok(new.last() == Some(&eos) || tokenizer.decode(new, true)?.contains("</answer>"))
    };
    let completions = generate::greedy(device, inference, &prompts, max_new_tokens, finished)?;
    let graded = records.iter().zip(completions).map(|(record, ids)| {
        let completion = tokenizer.decode(&ids, true)?;
        let extracted = answer::extract(&completion).map(str::to_owned);
        let correct = extracted
            .as_ref()
            .is_some_and(|e| answer::equal(e, &record.answer));
        Ok(Graded {
            problem: record.problem.clone(),
            answer: record.answer.clone(),
            completion,
            extracted,
            correct,
        })
    });
    graded.collect()
}

/// The share of right answers.
pub fn pass_at_1(graded: &[Graded]) -> f64 {
    graded.iter().filter(|g| g.correct).count() as f64 / graded.len().max(1) as f64
}
