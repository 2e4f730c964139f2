//! How the next token is drawn from a model's logits.

use crate::error::{Error, Result};
use crate::rng::{Purpose, Stream};

/// Where generation draws its tokens from. Temperature, then top-k, then top-p (nucleus sampling,
/// Holtzman et al. 2020, arXiv 1904.09751), each on what the one before left.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Sampling {
    /// Divides the logits; 0 takes the likeliest token, the first of equals.
    pub temperature: f32,
    /// The smallest set of likeliest tokens whose probability reaches this; 1 takes all.
    pub top_p: f32,
    /// So many of the likeliest tokens; 0 takes all.
    pub top_k: usize,
    /// Seed of the draws.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token each time.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            seed: 0,
        }
    }

    /// An error naming the setting that is out of its range.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            let what = format!("expected 0 or more, found {}", self.temperature);
            return Err(Error::setting("--temperature", what));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            let what = format!("expected above 0 and at most 1, found {}", self.top_p);
            return Err(Error::setting("--top-p", what));
        }
        Ok(())
    }

    /// The token at `position` of sequence `sequence`, sample `sample` (below 2^24) of its prompt.
    /// The draw depends on these and the seed alone, not on what else is generated beside it.
    ///
    /// # Errors
    /// Logits without a finite value.
    pub fn draw(&self, logits: &[f32], sequence: u64, sample: u32, position: u64) -> Result<u32> {
        let best = argmax(logits).ok_or_else(|| Error::NotFinite {
            what: format!("the logits of token {position} hold no finite value"),
        })?;
        if self.temperature == 0.0 || self.top_k == 1 {
            return Ok(best as u32);
        }
        let [high, low, ..] =
            Stream::new(self.seed, Purpose::Sampling, sequence, sample).block(position as u32);
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
        let uniform = bits as f64 / (1u64 << 53) as f64;
        let (max, scale) = (f64::from(logits[best]), 1.0 / f64::from(self.temperature));
        let weight = |&logit: &f32| match logit {
            l if l > f32::NEG_INFINITY => ((f64::from(l) - max) * scale).exp(),
            _ => 0.0,
        };
        let weights: Vec<f64> = logits.iter().map(weight).collect();
        let nucleus = self.nucleus(&weights);
        Ok(pick(&weights, &nucleus, uniform).unwrap_or(best as u32))
    }

    /// The tokens that may be drawn, likeliest first.
    fn nucleus(&self, weights: &[f64]) -> Vec<u32> {
        let limit = match self.top_k {
            0 => weights.len(),
            k => k.min(weights.len()),
        };
        if limit == weights.len() && self.top_p >= 1.0 {
            return (0..weights.len() as u32).collect();
        }
        // Few tokens make up the nucleus as a rule: sort some, and more where they do not reach.
        let mut sorted = limit.min(256);
        loop {
            let head = likeliest(weights, sorted);
            let total: f64 = match limit == weights.len() {
                true => weights.iter().sum(),
                false if sorted == limit => head.iter().map(|&i| weights[i as usize]).sum(),
                false => f64::INFINITY,
            };
            let wanted = total * f64::from(self.top_p);
            let mut sum = 0.0;
            let reached = head.iter().position(|&i| {
                sum += weights[i as usize];
                sum >= wanted
            });
            match reached {
                Some(last) => return head[..=last].to_vec(),
                None if sorted == limit => return head,
                None => sorted = limit.min(sorted * 16),
            }
        }
    }
}

/// The `n` tokens of the largest weights, in descending order; of equals the lower id first.
fn likeliest(weights: &[f64], n: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..weights.len() as u32).collect();
    let order = |&a: &u32, &b: &u32| {
        let (x, y) = (weights[a as usize], weights[b as usize]);
        y.total_cmp(&x).then(a.cmp(&b))
    };
    if n < ids.len() {
        ids.select_nth_unstable_by(n, order);
        ids.truncate(n);
    }
    ids.sort_unstable_by(order);
    ids
}

/// The first of `ids` where the sum of the weights so far exceeds the fraction `uniform` of all.
fn pick(weights: &[f64], ids: &[u32], uniform: f64) -> Option<u32> {
    let total: f64 = ids.iter().map(|&i| weights[i as usize]).sum();
    let mut sum = 0.0;
    let drawn = ids.iter().find(|&&i| {
        sum += weights[i as usize];
        sum > uniform * total
    });
    drawn.copied()
}

/// The index of the largest value that is not NaN and above minus infinity; of equals the first.
fn argmax(row: &[f32]) -> Option<usize> {
    let start = (None, f32::NEG_INFINITY);
    let better = |best: (Option<usize>, f32), (i, &v): (usize, &f32)| match v > best.1 {
        true => (Some(i), v),
        false => best,
    };
    row.iter().enumerate().fold(start, better).0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(temperature: f32, top_p: f32, top_k: usize) -> Sampling {
        Sampling {
            temperature,
            top_p,
            top_k,
            seed: 7,
        }
    }

    /// How often each of 5 tokens comes in 20 000 draws.
    fn shares(sampling: Sampling, logits: &[f32; 5]) -> [f64; 5] {
        let mut counts = [0.0; 5];
        for i in 0..20_000 {
            let token = sampling.draw(logits, i / 100, 0, i % 100).unwrap();
            counts[token as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    fn close(found: [f64; 5], want: [f64; 5]) {
        for (f, w) in found.iter().zip(want) {
            // Five standard deviations of a share of 20 000 draws at most.
            assert!(
                (f - w).abs() < 5.0 * (0.25f64 / 20_000.0).sqrt(),
                "{found:?}"
            );
            assert!(w > 0.0 || *f == 0.0, "{found:?}");
        }
    }

    fn logits() -> [f32; 5] {
        [0.4f32, 0.1, 0.2, 0.2, 0.1].map(f32::ln)
    }

    #[test]
    fn tokens_are_drawn_with_their_probability() {
        close(
            shares(sampling(1.0, 1.0, 0), &logits()),
            [0.4, 0.1, 0.2, 0.2, 0.1],
        );
        // At temperature 1/2 probabilities are squared.
        let squared = [16.0 / 26.0, 1.0 / 26.0, 4.0 / 26.0, 4.0 / 26.0, 1.0 / 26.0];
        close(shares(sampling(0.5, 1.0, 0), &logits()), squared);
    }

    #[test]
    fn top_k_and_top_p_leave_out_the_unlikely() {
        close(
            shares(sampling(1.0, 1.0, 2), &logits()),
            [2.0 / 3.0, 0.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            shares(sampling(1.0, 0.75, 0), &logits()),
            [0.5, 0.0, 0.25, 0.25, 0.0],
        );
        close(
            shares(sampling(1.0, 0.39, 0), &logits()),
            [1.0, 0.0, 0.0, 0.0, 0.0],
        );
        // Top-p counts within what top-k left: 4/6 is below 0.7, so the second is needed.
        close(
            shares(sampling(1.0, 0.7, 2), &logits()),
            [2.0 / 3.0, 0.0, 1.0 / 3.0, 0.0, 0.0],
        );
        close(
            shares(sampling(1.0, 0.65, 2), &logits()),
            [1.0, 0.0, 0.0, 0.0, 0.0],
        );
    }

    #[test]
    fn a_nucleus_wider_than_what_is_sorted_first_is_found() {
        let weights = vec![1.0; 5_000];
        assert_eq!(sampling(1.0, 0.5, 0).nucleus(&weights).len(), 2_500);
        assert_eq!(sampling(1.0, 1.0, 4_000).nucleus(&weights).len(), 4_000);
        assert_eq!(sampling(1.0, 0.5, 4_000).nucleus(&weights).len(), 2_000);
    }

    #[test]
    fn a_draw_depends_on_seed_sequence_sample_and_position() {
        let logits = vec![0.0; 10_000];
        let draw = |seed, sequence, sample, position| {
            let sampling = Sampling {
                seed,
                ..sampling(1.0, 1.0, 0)
            };
            sampling.draw(&logits, sequence, sample, position).unwrap()
        };
        let first = draw(1, 1, 1, 1);
        assert_eq!(draw(1, 1, 1, 1), first);
        for other in [
            draw(2, 1, 1, 1),
            draw(1, 2, 1, 1),
            draw(1, 1, 2, 1),
            draw(1, 1, 1, 2),
        ] {
            assert_ne!(other, first);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_nothing_finite_is_an_error() {
        let greedy = Sampling::greedy();
        assert_eq!(greedy.draw(&[1.0, 3.0, f32::NAN, 3.0], 0, 0, 0).unwrap(), 1);
        let error = greedy.draw(&[f32::NAN; 3], 0, 0, 5).unwrap_err();
        assert!(error.to_string().contains("token 5"), "{error}");
        for wrong in [
            sampling(-1.0, 1.0, 0),
            sampling(f32::NAN, 1.0, 0),
            sampling(1.0, 0.0, 0),
            sampling(1.0, 1.1, 0),
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }
}
