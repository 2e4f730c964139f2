//! What the latents of an SAE stand for: which of them fire on the marks of reasoning, how they
//! are spread over a model's layers, and what each SAE costs the model.
//!
//! A *reasoning feature* (Resa, arXiv 2506.09967) is a latent that fires on the tokens of
//! `<think>` or `</think>` and on no other token of the texts.

mod firings;
mod hookpoint;
pub mod mixture;
pub mod plot;
mod texts;

pub use hookpoint::{Context, Feature, Hookpoint, Options, analyse};
pub use mixture::{Component, Mixture};
pub use texts::{MARKS, MarkedText};

use serde::Serialize;

/// What SAEs at several layers of one model show.
#[derive(Clone, Debug, Serialize)]
pub struct Features {
    /// Texts that were read.
    pub texts: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Of these, tokens of `<think>` and `</think>`.
    pub marked_tokens: usize,
    /// Mean negative log-likelihood in nats a token of the model alone.
    pub loss: f64,
    /// Each layer with an SAE, ascending.
    pub hookpoints: Vec<Hookpoint>,
    /// A mixture of three Gaussians over the layers, weighted by their numbers of reasoning
    /// features; `None` where fewer than three layers have any.
    pub mixture: Option<Mixture>,
}

impl Features {
    /// Layer and number of reasoning features, ascending by layer.
    pub fn counts(&self) -> Vec<(usize, usize)> {
        let hookpoints = self.hookpoints.iter();
        hookpoints
            .map(|h| (h.layer, h.reasoning_features))
            .collect()
    }

    /// The layers in the order in which they offer themselves as hookpoints: most reasoning
    /// features first; among equals, the SAE that keeps more of the model's loss.
    pub fn ranking(&self) -> Vec<usize> {
        let mut order: Vec<&Hookpoint> = self.hookpoints.iter().collect();
        order.sort_by(|a, b| {
            let fewer = b.reasoning_features.cmp(&a.reasoning_features);
            fewer.then(b.loss_recovered.total_cmp(&a.loss_recovered))
        });
        order.iter().map(|h| h.layer).collect()
    }
}

/// How far two spreads over layers are apart, in layers: the least mean distance by which one's
/// shares have to be moved to give the other (the earth mover's distance). `None` where either
/// has no features, or their layers differ.
pub fn distance(a: &[(usize, usize)], b: &[(usize, usize)]) -> Option<f64> {
    let total = |counts: &[(usize, usize)]| counts.iter().map(|&(_, n)| n).sum::<usize>() as f64;
    let (sum_a, sum_b) = (total(a), total(b));
    let same_layers = a.iter().map(|c| c.0).eq(b.iter().map(|c| c.0));
    if sum_a == 0.0 || sum_b == 0.0 || !same_layers {
        return None;
    }
    let (mut carried, mut distance) = (0.0f64, 0.0);
    for (i, (&(layer, n), &(_, m))) in a.iter().zip(b).enumerate() {
        carried += n as f64 / sum_a - m as f64 / sum_b;
        if let Some(&(next, _)) = a.get(i + 1) {
            distance += carried.abs() * (next - layer) as f64;
        }
    }
    Some(distance)
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn the_distance_of_two_spreads_is_how_far_their_shares_move() {
        let at = |counts: [usize; 3]| -> Vec<_> { [2, 5, 9].into_iter().zip(counts).collect() };
        assert_eq!(distance(&at([4, 0, 0]), &at([0, 0, 9])), Some(7.0));
        assert_eq!(distance(&at([1, 1, 2]), &at([2, 2, 4])), Some(0.0));
        // Half of it moves from layer 2 to 5.
        assert_eq!(distance(&at([2, 0, 0]), &at([1, 1, 0])), Some(1.5));
        assert_eq!(distance(&at([0, 0, 0]), &at([1, 1, 0])), None);
        assert_eq!(distance(&[(1, 1)], &[(2, 1)]), None);
    }
}
