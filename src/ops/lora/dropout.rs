//! Inverted dropout of an adapter's inputs (Srivastava et al. 2014), decided by 16 random bits an
//! element.

use half::bf16;
use rayon::prelude::*;

use crate::device::Device;
use crate::device::simd::vectorized;
use crate::error::Result;
use crate::ops::gemm::Kept;
use crate::ops::stored::Stored;
use crate::rng::Stream;
use crate::tensor::{DType, Tensor};

/// Elements that a block of a stream decides on, which are the bits of a byte of a mask.
const ELEMENTS: usize = 8;
/// Bytes of a mask, or so many times eight values, for one task.
const CHUNK: usize = 1 << 11;

/// Zero with probability `p`, rounded to 2^-16, else scaled so that the mean stays.
#[derive(Clone, Debug)]
pub struct Dropout {
    /// Probability of a zero, in \[0, 1).
    pub p: f32,
    /// Where the random bits come from: the half i % 2, lower first, of word i / 2 decides on
    /// element i.
    pub stream: Stream,
    /// On a GPU, where the stream's step (low word, high word) is read in place of the stream's
    /// own, \[2\] u32: so the same launch draws another mask when the number there has changed.
    pub step: Option<Tensor>,
}

impl Dropout {
    /// An element is dropped where its half of a word is below this.
    pub(super) fn threshold(&self) -> u32 {
        (f64::from(self.p) * 65536.0).round().clamp(0.0, 65535.0) as u32
    }

    /// The factor on what is kept, the inverse of the share that is kept in the mean.
    pub(super) fn keep(&self) -> f32 {
        (65536.0 / f64::from(65536 - self.threshold())) as f32
    }

    /// What is kept of `n` elements, drawn on all threads of the current pool.
    pub(super) fn draw(&self, n: usize) -> Mask {
        let threshold = self.threshold();
        let mut kept = vec![0; n.div_ceil(ELEMENTS)];
        let chunks = kept.par_chunks_mut(CHUNK).enumerate();
        chunks.for_each(|(chunk, kept)| {
            let first = (chunk * CHUNK) as u32;
            vectorized!({
                for (kept, block) in kept.iter_mut().zip(first..) {
                    *kept = bits(self.stream.block(block), threshold);
                }
            })
        });
        let keep = self.keep();
        Mask { kept, keep }
    }
}

/// Which halves of a block's words are not below the threshold.
#[inline(always)]
fn bits(words: [u32; 4], threshold: u32) -> u8 {
    let mut bits = 0;
    for (w, word) in words.into_iter().enumerate() {
        bits |= u32::from(word & 0xffff >= threshold) << (2 * w);
        bits |= u32::from(word >> 16 >= threshold) << (2 * w + 1);
    }
    bits as u8
}

/// What dropout kept.
pub(super) struct Mask {
    /// Bit i % 8 of byte i / 8 says whether element i is kept.
    kept: Vec<u8>,
    keep: f32,
}

impl Mask {
    pub(super) fn kept(&self) -> Kept<'_> {
        Kept {
            mask: &self.kept,
            scale: self.keep,
        }
    }

    /// X, of as many elements as the mask, with what is dropped zero and the rest scaled.
    pub(super) fn apply(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        match x.dtype() {
            DType::Bf16 => self.apply_to::<bf16>(device, x),
            _ => self.apply_to::<f32>(device, x),
        }
    }

    fn apply_to<T: Stored>(&self, device: &Device, x: &Tensor) -> Result<Tensor> {
        let mut out = device.buffer(x.len());
        self.kept().copy(&mut out, T::of_tensor(x)?);
        T::into_tensor(out, x.shape())
    }
}
