//! A token for each row of logits: temperature, then top-k, then top-p (nucleus sampling, Holtzman
//! et al. 2020, arXiv 1904.09751), each on what the one before left.
//!
//! Token i weighs ⌊2³⁹ 2^−hᵢ⌋ with hᵢ = (max l − lᵢ) log₂ e / temperature, in f32; one that is 2³⁹
//! times less likely than the likeliest is not drawn. Tokens are ordered by their logit, of equals
//! the lower id first. The token drawn is the first, in the order of ids, at which the sum of what
//! is kept exceeds the random word's share of it all.
//!
//! Sums are of integers, and host and device compute weights with the same roundings: the tokens
//! are the same on every device, whatever stands beside a row and in whatever order it is summed.
//!
//! On CUDA only the tokens leave the device. A row of 4 V bytes is read once for the likeliest
//! token (two launches), twice for a draw (three), three times where top-k or top-p cut (four): from
//! memory once, as long as all rows fit into the L2 cache.

mod cpu;
mod cuda;

use rayon::prelude::*;

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

const NAME: &str = "sample";

/// What stands for a token in a row where none can be drawn.
pub const NONE: u32 = u32::MAX;

/// Tokens that a row may have: with more their weights' sum would not fit 64 bits.
const LARGEST: usize = 1 << 24;

/// Which tokens may be drawn, and how likely each is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filter {
    /// Divides the logits; 0 takes the likeliest token, the first of equals.
    pub temperature: f32,
    /// So many of the likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// The smallest set of likeliest tokens whose probability reaches this, above 0; 1 takes all.
    pub top_p: f32,
}

impl Filter {
    /// log₂ e / temperature; `None` for the likeliest token.
    fn scale(&self) -> Option<f32> {
        let drawn = self.temperature > 0.0 && self.top_k != 1;
        drawn.then(|| (std::f32::consts::LOG2_E / self.temperature).min(f32::MAX))
    }

    /// Whether top-k or top-p may leave a token of `vocab` out.
    fn cuts(&self, vocab: usize) -> bool {
        self.top_p < 1.0 || (self.top_k > 0 && self.top_k < vocab)
    }
}

/// The tokens \[B\] u32 drawn from logits \[B, V\] f32 with a random word for each row, on the
/// device of the logits' operators; [`NONE`] for a row without a logit above minus infinity. Logits
/// that are NaN count as minus infinity.
///
/// # Errors
/// Words that are not one for each row, no logits or rows of 2²⁴ or more, a temperature or a
/// probability out of its range.
pub fn sample(device: &Device, logits: &Tensor, filter: Filter, words: &[u64]) -> Result<Tensor> {
    let (rows, vocab) = logits.matrix_dims();
    if rows != words.len() || rows == 0 || vocab == 0 || vocab >= LARGEST {
        return Err(Error::operand(
            NAME,
            format!("{} rows of 1 to {} logits", words.len(), LARGEST - 1),
            format!("shape {:?}", logits.shape()),
        ));
    }
    let Filter {
        temperature, top_p, ..
    } = filter;
    if !(temperature >= 0.0 && temperature.is_finite() && top_p > 0.0 && top_p <= 1.0) {
        return Err(Error::operand(
            NAME,
            "a temperature of 0 or more and a probability above 0 and at most 1",
            format!("{temperature} and {top_p}"),
        ));
    }
    if let Device::Cuda(cuda) = device {
        return cuda::sample(cuda, logits, filter, words);
    }
    let rows = logits.f32s()?.par_chunks(vocab).zip(words);
    let tokens = rows.map(|(row, &word)| cpu::draw(row, filter, word).unwrap_or(NONE));
    Tensor::from_u32(tokens.collect(), [words.len()])
}
