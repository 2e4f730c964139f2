use crate::device::simd::vectorized;

/// Values tested at once against the threshold.
const BLOCK: usize = 32;

/// The running selection of one token: the k largest positive values seen so far, in any order,
/// and a threshold that a later value must exceed to matter.
///
/// Latents are offered in ascending order, so among equal values the earlier, lower index
/// stays. After the first few hundred latents hardly any value passes the threshold, and the
/// cost is one comparison a value.
pub(super) struct RowSelection {
    k: usize,
    capacity: usize,
    keys: Vec<u64>,
    threshold: f32,
}

impl RowSelection {
    pub(super) fn new(k: usize) -> Self {
        let capacity = (2 * k).max(64);
        Self {
            k,
            capacity,
            keys: Vec::with_capacity(capacity),
            threshold: 0.0,
        }
    }

    /// Offers `products[i] + bias[i]` as latent `first + i`. False when a value is NaN or +inf.
    pub(super) fn offer(&mut self, first: u32, products: &[f32], bias: &[f32]) -> bool {
        vectorized!({
            let mut first = first;
            let blocks = products.chunks(BLOCK).zip(bias.chunks(BLOCK));
            for (products, bias) in blocks {
                if !self.offer_block(first, products, bias) {
                    return false;
                }
                first += BLOCK as u32;
            }
            true
        })
    }

    /// [`Self::offer`] for at most [`BLOCK`] values, within a vectorised loop.
    #[inline(always)]
    pub(super) fn offer_block(&mut self, first: u32, products: &[f32], bias: &[f32]) -> bool {
        !any_above(products, bias, self.threshold) || self.keep(first, products, bias)
    }

    fn keep(&mut self, first: u32, products: &[f32], bias: &[f32]) -> bool {
        for (latent, (p, b)) in (first..).zip(products.iter().zip(bias)) {
            let value = p + b;
            if value <= self.threshold {
                continue;
            }
            if !value.is_finite() {
                return false;
            }
            self.keys.push(key(value, latent));
            if self.keys.len() == self.capacity {
                self.prune();
            }
        }
        true
    }

    /// Drops all but the k largest keys.
    fn prune(&mut self) {
        if self.keys.len() > self.k {
            let (_, &mut kth, _) = self
                .keys
                .select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
            self.keys.truncate(self.k);
            self.threshold = value_of(kth);
        }
    }

    /// Writes the selection in ascending order of latents. Where fewer than k values were
    /// positive, the rest are zeros of the lowest other latents, as a sort of the rectified
    /// values would have them. There must be at least k latents in all.
    pub(super) fn finish(&mut self, acts: &mut [f32], indices: &mut [u32]) {
        self.prune();
        self.keys.sort_unstable_by_key(|&key| latent_of(key));
        let mut kept = self.keys.iter().copied().peekable();
        let mut zeros = self.k - self.keys.len();
        let mut latent = 0;
        for (act, index) in acts.iter_mut().zip(indices) {
            // Without zeros to place, go straight to the next kept latent.
            match kept.peek() {
                Some(&key) if zeros == 0 || latent_of(key) == latent => {
                    (*act, *index) = (value_of(key), latent_of(key));
                    kept.next();
                }
                _ => {
                    (*act, *index) = (0.0, latent);
                    zeros -= 1;
                }
            }
            latent = *index + 1;
        }
    }
}

/// Whether any sum is above the threshold or NaN.
#[inline(always)]
fn any_above(products: &[f32], bias: &[f32], threshold: f32) -> bool {
    if let (Ok(products), Ok(bias)) = (
        <&[f32; BLOCK]>::try_from(products),
        <&[f32; BLOCK]>::try_from(bias),
    ) {
        let mut above = 0u32;
        for i in 0..BLOCK {
            above |= u32::from(exceeds(products[i] + bias[i], threshold));
        }
        return above != 0;
    }
    let mut sums = products.iter().zip(bias).map(|(p, b)| p + b);
    sums.any(|sum| exceeds(sum, threshold))
}

/// Above the threshold, or NaN.
#[inline(always)]
fn exceeds(value: f32, threshold: f32) -> bool {
    value > threshold || value.is_nan()
}

/// Orders by value, then by the lower latent. Bits of positive floats order as the floats do.
fn key(value: f32, latent: u32) -> u64 {
    u64::from(value.to_bits()) << 32 | u64::from(!latent)
}

fn value_of(key: u64) -> f32 {
    f32::from_bits((key >> 32) as u32)
}

fn latent_of(key: u64) -> u32 {
    !(key as u32)
}
