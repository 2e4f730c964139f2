//! Greedy generation, by a full forward pass for each token: meant for short answers.

use faer::Accum;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::Inference;
use crate::model::Layout;
use crate::ops::gemm::product_nt;
use crate::tensor::Tensor;

/// Prompts that go through the model together.
const BATCH: usize = 64;

/// The most likely continuation of each prompt, token by token, until `finished` says so of the
/// new tokens or there are `max_new_tokens` of them.
pub fn greedy(
    device: &Device,
    inference: &Inference,
    prompts: &[Vec<u32>],
    max_new_tokens: usize,
    mut finished: impl FnMut(&[u32]) -> Result<bool>,
) -> Result<Vec<Vec<u32>>> {
    if let Some(i) = prompts.iter().position(Vec::is_empty) {
        return Err(Error::operand(
            "generate",
            "prompts of at least one token",
            format!("prompt {i} of none"),
        ));
    }
    let mut sequences = prompts.to_vec();
    for start in (0..prompts.len()).step_by(BATCH) {
        let mut active: Vec<usize> = (start..prompts.len().min(start + BATCH)).collect();
        for _ in 0..max_new_tokens {
            if active.is_empty() {
                break;
            }
            let next = next_tokens(device, inference, &sequences, &active)?;
            let mut still_active = Vec::new();
            for (i, token) in active.into_iter().zip(next) {
                sequences[i].push(token);
                if !finished(&sequences[i][prompts[i].len()..])? {
                    still_active.push(i);
                }
            }
            active = still_active;
        }
    }
    let new = |(sequence, prompt): (Vec<u32>, &Vec<u32>)| sequence[prompt.len()..].to_vec();
    Ok(sequences.into_iter().zip(prompts).map(new).collect())
}

/// The most likely next token of the chosen sequences.
fn next_tokens(
    device: &Device,
    inference: &Inference,
    sequences: &[Vec<u32>],
    chosen: &[usize],
) -> Result<Vec<u32>> {
    let longest = chosen
        .iter()
        .map(|&i| sequences[i].len())
        .max()
        .unwrap_or(0);
    // Shorter sequences are filled up behind their end, where causal attention does not look.
    let mut ids = vec![0; chosen.len() * longest];
    for (row, &i) in ids.chunks_exact_mut(longest).zip(chosen) {
        row[..sequences[i].len()].copy_from_slice(&sequences[i]);
    }
    let tokens = ids.len();
    let layout = Layout::new(&inference.model.config, chosen.len(), longest)?;
    let head = &inference.model.lm_head;
    let (vocab, d) = head.matrix_dims();
    device.run(|| {
        let hidden = inference.hidden(device, Tensor::from_u32(ids, [tokens])?, &layout)?;
        let hidden = hidden.f32s()?;
        let mut last = Vec::with_capacity(chosen.len() * d);
        for (row, &i) in chosen.iter().enumerate() {
            last.extend_from_slice(&hidden[(row * longest + sequences[i].len() - 1) * d..][..d]);
        }
        let mut logits = device.buffer(chosen.len() * vocab);
        product_nt(device, &mut logits, Accum::Replace, &last, head, 1.0)?;
        Ok(logits.chunks_exact(vocab).map(argmax).collect())
    })
}

/// The index of the largest value; of equal ones the first.
fn argmax(row: &[f32]) -> u32 {
    let best = row
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (i, &v)| {
            if v > best.1 { (i, v) } else { best }
        });
    best.0 as u32
}
