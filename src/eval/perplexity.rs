//! Token-level loss on packed text.

use crate::data::pack::Packed;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::Inference;
use crate::model::Layout;
use crate::ops::Operator;
use crate::ops::cross_entropy::CrossEntropy;
use crate::tensor::Tensor;

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Perplexity {
    /// exp of the mean loss.
    pub perplexity: f64,
    /// Mean negative log-likelihood in nats a token.
    pub mean_nll: f64,
    /// Tokens that were predicted: all of a row but its first.
    pub tokens: u64,
}

/// The loss over all rows; `done` is called with the number of rows behind it.
pub fn perplexity(
    device: &Device,
    inference: &Inference,
    packed: &Packed,
    mut done: impl FnMut(usize),
) -> Result<Perplexity> {
    if packed.seq_len < 2 {
        return Err(Error::setting(
            "--seq-len",
            "expected at least 2, to have a token to predict",
        ));
    }
    let layout = Layout::new(&inference.model.config, 1, packed.seq_len)?;
    let (mut sum, mut tokens) = (0.0, 0);
    for row in 0..packed.rows() {
        let ids = packed.row(row);
        let doc_starts = packed.row_doc_starts(row).map(<[u32]>::to_vec);
        let doc_starts = doc_starts
            .map(|s| Tensor::from_u32(s, [ids.len()]))
            .transpose()?;
        let layout = layout.with_batch(1, doc_starts);
        sum += token_losses(device, inference, ids, &layout)?
            .iter()
            .sum::<f64>();
        tokens += packed.seq_len as u64 - 1;
        done(row + 1);
    }
    let mean_nll = sum / tokens as f64;
    Ok(Perplexity {
        perplexity: mean_nll.exp(),
        mean_nll,
        tokens,
    })
}

/// The negative log-likelihood in nats of every token of `ids` but the first, given those before.
pub fn token_losses(
    device: &Device,
    inference: &Inference,
    ids: &[u32],
    layout: &Layout,
) -> Result<Vec<f64>> {
    let mut targets: Vec<_> = ids.iter().skip(1).map(|&id| Some(id)).collect();
    targets.push(None);
    let ids = Tensor::from_u32(ids.to_vec(), [ids.len()])?;
    let losses = device.run(|| {
        let hidden = inference.hidden(device, ids, layout)?;
        let head = inference.model.lm_head.clone();
        let (mut outputs, _) =
            CrossEntropy { targets, head }.forward(device, &[&hidden], &[false])?;
        Ok::<_, Error>(outputs.swap_remove(1))
    })?;
    let mut losses: Vec<f64> = losses.f32s()?.iter().map(|&v| v.into()).collect();
    losses.pop();
    Ok(losses)
}
