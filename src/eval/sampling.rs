//! How the next token is drawn from a model's logits.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::ops::sample::{Filter, NONE, sample};
use crate::rng::{Purpose, Stream};
use crate::tensor::Tensor;

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

/// What a draw is for.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Number of the prompt.
    pub sequence: u64,
    /// Number of the completion among those of the same prompt; below 2^24.
    pub sample: u32,
    /// Tokens of the completion before this one.
    pub position: u64,
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

    /// The next token of each of B sequences, for their logits \[B, V\] f32 where the device's
    /// operators leave them. A draw depends on its place and the seed alone, not on what else is
    /// generated beside it.
    ///
    /// # Errors
    /// Logits without a finite value; places that are not one for each row.
    pub fn draw(&self, device: &Device, logits: &Tensor, places: &[Place]) -> Result<Vec<u32>> {
        let filter = Filter {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
        };
        let words: Vec<u64> = places.iter().map(|place| self.word(place)).collect();
        let tokens = sample(device, logits, filter, &words)?.to_u32()?;
        let tokens = tokens.u32s()?.to_vec();
        match tokens.iter().position(|&token| token == NONE) {
            Some(row) => Err(Error::NotFinite {
                what: format!(
                    "the logits of token {} hold no finite value",
                    places[row].position
                ),
            }),
            None => Ok(tokens),
        }
    }

    fn word(&self, place: &Place) -> u64 {
        let stream = Stream::new(self.seed, Purpose::Sampling, place.sequence, place.sample);
        let [high, low, ..] = stream.block(place.position as u32);
        u64::from(high) << 32 | u64::from(low)
    }
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

    fn draw(sampling: Sampling, logits: Vec<f32>, place: Place) -> Result<u32> {
        let device = Device::cpu(1)?;
        let shape = [1, logits.len()];
        let logits = Tensor::from_vec(logits, shape)?;
        let tokens = sampling.draw(&device, &logits, &[place])?;
        Ok(tokens[0])
    }

    #[test]
    fn a_draw_depends_on_seed_sequence_sample_and_position() {
        let token = |seed, sequence, sample, position| {
            let sampling = Sampling {
                seed,
                ..sampling(1.0, 1.0, 0)
            };
            let place = Place {
                sequence,
                sample,
                position,
            };
            draw(sampling, vec![0.0; 10_000], place).unwrap()
        };
        let first = token(1, 1, 1, 1);
        assert_eq!(token(1, 1, 1, 1), first);
        for other in [
            token(2, 1, 1, 1),
            token(1, 2, 1, 1),
            token(1, 1, 2, 1),
            token(1, 1, 1, 2),
        ] {
            assert_ne!(other, first);
        }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest_and_nothing_finite_is_an_error() {
        let place = Place {
            sequence: 0,
            sample: 0,
            position: 5,
        };
        let greedy = |logits| draw(Sampling::greedy(), logits, place);
        assert_eq!(greedy(vec![1.0, 3.0, f32::NAN, 3.0]).unwrap(), 1);
        let error = greedy(vec![f32::NAN; 3]).unwrap_err();
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
