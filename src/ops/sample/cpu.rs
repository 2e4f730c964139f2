//! The draw from one row in host memory.

use std::cmp::Reverse;

use super::Filter;
use crate::device::simd::vectorized;
use crate::ops::math::{LANES, exp2_of_negative};

/// Weight of the likeliest token.
const ONE: f32 = (1u64 << 39) as f32;

/// The order of tokens: by logit, of equals the lower id has the larger key; 0 for a token that
/// cannot be drawn.
#[inline(always)]
fn key_of(logit: f32, id: usize) -> u64 {
    // Both zeros are +0 then.
    let bits = (logit + 0.0).to_bits();
    let order = match bits >> 31 {
        0 => bits | 1 << 31,
        _ => !bits,
    };
    match logit > f32::NEG_INFINITY {
        true => u64::from(order) << 32 | u64::from(!(id as u32)),
        false => 0,
    }
}

fn id_of(key: u64) -> usize {
    !(key as u32) as usize
}

/// The weights of tokens with these logits, the largest of which is `max`.
#[inline(always)]
fn weigh(weights: &mut [u64], logits: &[f32], max: f32, scale: f32) {
    for (weight, &logit) in weights.iter_mut().zip(logits) {
        // Also where both are infinite.
        let halvings = if logit == max {
            0.0
        } else {
            (max - logit) * scale
        };
        // NaN becomes 0.
        *weight = (exp2_of_negative(-halvings) * ONE) as u64;
    }
}

/// The largest logit, minus infinity where there is none; NaN is none.
#[inline(always)]
fn largest(logits: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (vectors, rest) = logits.as_chunks::<LANES>();
    for vector in vectors {
        for (l, &v) in lanes.iter_mut().zip(vector) {
            *l = if v > *l { v } else { *l };
        }
    }
    let all = lanes.iter().chain(rest);
    all.fold(f32::NEG_INFINITY, |l, &v| if v > l { v } else { l })
}

/// The token that `word` draws; `None` where no logit is above minus infinity.
pub(super) fn draw(logits: &[f32], filter: Filter, word: u64) -> Option<u32> {
    let max = vectorized!(largest(logits));
    if max == f32::NEG_INFINITY {
        return None;
    }
    let best = logits.iter().position(|&l| l == max)?;
    let keys = || logits.iter().enumerate().map(|(i, &l)| key_of(l, i));
    let Some(scale) = filter.scale() else {
        return Some(best as u32);
    };
    let mut weights = vec![0; logits.len()];
    vectorized!(weigh(&mut weights, logits, logits[best], scale));
    if filter.cuts(logits.len()) {
        let candidates = keys().zip(&weights).filter(|(_, weight)| **weight > 0);
        let least = least_kept(candidates.map(|(key, _)| key).collect(), &weights, filter);
        let all = keys().zip(&mut weights);
        all.filter(|(key, _)| *key < least)
            .for_each(|(_, weight)| *weight = 0);
    }
    let total = u128::from(weights.iter().sum::<u64>());
    let target = ((u128::from(word) * total) >> 64) as u64;
    let mut sum = 0;
    let drawn = weights.iter().position(|weight| {
        sum += weight;
        sum > target
    });
    drawn.map(|id| id as u32)
}

/// The least key that top-k and top-p keep.
fn least_kept(mut keys: Vec<u64>, weights: &[u64], filter: Filter) -> u64 {
    let Filter { top_k, top_p, .. } = filter;
    let descending = |&key: &u64| Reverse(key);
    let mut least = 0;
    if top_k > 0 && top_k < keys.len() {
        least = *keys.select_nth_unstable_by_key(top_k - 1, descending).1;
        keys.truncate(top_k);
    }
    if top_p >= 1.0 {
        return least;
    }
    let weight = |key: &u64| weights[id_of(*key)];
    let total: u64 = keys.iter().map(weight).sum();
    let wanted = (total as f64 * f64::from(top_p)).ceil() as u64;
    let wanted = wanted.min(total).max(1);
    // Few tokens reach it as a rule: sort some, and more where they do not.
    let mut sorted = 0;
    while sorted < keys.len() {
        sorted = keys.len().min((sorted * 16).max(256));
        if sorted < keys.len() {
            keys.select_nth_unstable_by_key(sorted, descending);
        }
        keys[..sorted].sort_unstable_by_key(descending);
        let mut sum = 0;
        let reached = keys[..sorted].iter().find(|key| {
            sum += weight(key);
            sum >= wanted
        });
        if let Some(&key) = reached {
            return key;
        }
    }
    least
}
