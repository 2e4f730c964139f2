//! Counter-based random numbers: Philox 4x32-10 (Salmon et al., "Parallel random numbers: as
//! easy as 1, 2, 3", SC'11). A number depends only on the seed and on what it is for, so every
//! device, thread count and resumed run draws the same ones.

/// What a random number is used for; keeps the streams of one seed apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Dropout masks of adapter inputs.
    Dropout = 1,
    /// Order of the sequences.
    Shuffle = 2,
    /// Initial weights.
    Init = 3,
    /// Tokens drawn during generation.
    Sampling = 4,
}

/// A stream of random numbers: 2^34 words that can be read at any position.
#[derive(Clone, Copy, Debug)]
pub struct Stream {
    key: [u32; 2],
    high: [u32; 3],
}

impl Stream {
    /// The stream for one purpose at one step. `index` tells apart what is drawn within a step
    /// (for instance layer x 8 + module); it must be below 2^24.
    pub fn new(seed: u64, purpose: Purpose, step: u64, index: u32) -> Self {
        debug_assert!(index < 1 << 24);
        Self {
            key: [seed as u32, (seed >> 32) as u32],
            high: [
                (purpose as u32) << 24 | index,
                step as u32,
                (step >> 32) as u32,
            ],
        }
    }

    /// Key and upper counter words, for a device that draws the same numbers.
    pub(crate) fn parts(&self) -> ([u32; 2], [u32; 3]) {
        (self.key, self.high)
    }

    /// Words 4 x `block` .. 4 x `block` + 3 of the stream.
    #[inline(always)]
    pub fn block(&self, block: u32) -> [u32; 4] {
        let [a, b, c] = self.high;
        philox([block, a, b, c], self.key)
    }

    /// Word `position` of the stream.
    pub fn word(&self, position: u64) -> u32 {
        self.block((position / 4) as u32)[(position % 4) as usize]
    }

    /// Value `position` of the stream, uniform in [0, 1) with 24 bits.
    pub fn uniform(&self, position: u64) -> f32 {
        (self.word(position) >> 8) as f32 * (1.0 / (1 << 24) as f32)
    }

    /// A permutation of `0..n` (Fisher-Yates).
    pub fn permutation(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            // Multiply-shift; its bias is below n / 2^32.
            let j = (u64::from(self.word(i as u64)) * (i as u64 + 1)) >> 32;
            order.swap(i, j as usize);
        }
        order
    }
}

/// With each word in 64 bits, as vectors multiply them: a loop over counters becomes one of
/// vectors.
#[inline(always)]
fn philox(counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const LOW: u64 = u32::MAX as u64;
    let mut counter = counter.map(u64::from);
    for _ in 0..10 {
        // The upper halves of words 1 and 3 are of no use and stay.
        let a = (counter[0] & LOW) * 0xD251_1F53;
        let b = (counter[2] & LOW) * 0xCD9E_8D57;
        counter = [
            b >> 32 ^ counter[1] ^ u64::from(key[0]),
            b,
            a >> 32 ^ counter[3] ^ u64::from(key[1]),
            a,
        ];
        key[0] = key[0].wrapping_add(0x9E37_79B9);
        key[1] = key[1].wrapping_add(0xBB67_AE85);
    }
    counter.map(|word| word as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_known_answers() {
        // Known-answer vectors of Random123 for philox4x32, 10 rounds.
        assert_eq!(
            philox([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_permutation_holds_every_index_once_and_depends_on_the_seed() {
        let order = Stream::new(7, Purpose::Shuffle, 0, 0).permutation(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(
            order,
            Stream::new(8, Purpose::Shuffle, 0, 0).permutation(1000)
        );
    }

    #[test]
    fn uniform_values_fill_the_unit_interval_evenly() {
        let stream = Stream::new(1, Purpose::Init, 0, 0);
        let n = 100_000;
        let mut buckets = [0u32; 10];
        for i in 0..n {
            buckets[(stream.uniform(i) * 10.0) as usize] += 1;
        }
        // Standard deviation of a bucket is about 95; 5 of them.
        assert!(
            buckets.iter().all(|&b| b.abs_diff(10_000) < 475),
            "{buckets:?}"
        );
    }
}
