//! Which kernel of kernels/gemm.cu a product runs on, and over how many blocks.

use crate::device::cuda::Kernel;
use crate::ops::gemm::cuda::Layout;
use crate::tensor::DType;

/// K of one pipeline stage.
pub(super) const STAGE: usize = 64;
/// Blocks that fill the largest device (two for each of 128 multiprocessors). A constant, so that
/// the order of a sum does not depend on the device (Hopper's own tiles apart).
const BLOCKS: usize = 256;
/// Longest side for which the tile with a short side is taken: one tile's, so that the other
/// operand is read once.
const NARROW: usize = 32;
/// Longest side of a result whose product is cut along K: the ranks of three adapters.
pub(super) const SHORT: usize = 96;
/// Stages a slice of K has at least, so that filling the pipeline is not what takes the time.
const LEAST_STAGES: usize = 4;

/// A kernel and the tile of the result that one of its blocks computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    function: &'static str,
    m: usize,
    n: usize,
    pub(super) threads: u32,
    stages: usize,
}

impl Tile {
    /// The tile for a product \[m, n\]. `aligned`: all rows of the operands begin at multiples of
    /// 16 bytes; `masked`: the product applies a dropout mask; `most_shared`: bytes of shared
    /// memory that a block may have. Another tile gives the same bits.
    pub(super) fn choose(
        layout: Layout,
        [m, n]: [usize; 2],
        aligned: bool,
        masked: bool,
        most_shared: usize,
    ) -> Self {
        let tile = |function, m, n, threads, stages| Self {
            function,
            m,
            n,
            threads,
            stages,
        };
        if !aligned {
            let function = match layout {
                Layout::Nt => "gemm_nt_unaligned",
                Layout::Nn => "gemm_nn_unaligned",
                Layout::Tn => "gemm_tn_unaligned",
            };
            return tile(function, 128, 32, 128, 4);
        }
        if layout == Layout::Tn && m <= NARROW && n > NARROW {
            return tile("gemm_tn_32x128", 32, 128, 128, 4);
        }
        if n <= NARROW && !masked {
            let function = match layout {
                Layout::Nt => "gemm_nt_128x32",
                Layout::Nn => "gemm_nn_128x32",
                Layout::Tn => "gemm_tn_128x32",
            };
            return tile(function, 128, 32, 128, 4);
        }
        let square = |function| tile(function, 128, 128, 256, 3);
        let wide = |function| tile(function, 128, 256, 256, 3);
        // The wide tile needs a third less of shared memory's bandwidth, but must fit, not pad
        // more nor leave multiprocessors without work.
        // A result that may be cut along K takes the same tile on all devices.
        let is_wide = m.min(n) > SHORT
            && (n.is_multiple_of(256) || n % 256 > 128)
            && m.div_ceil(128) * n.div_ceil(256) >= 100
            && wide("").shared() <= most_shared;
        match layout {
            Layout::Nt if is_wide => wide("gemm_nt_128x256"),
            Layout::Nt => square("gemm_nt_128x128"),
            // With a mask by words of it.
            Layout::Nn if is_wide && (!masked || n.is_multiple_of(32)) => wide("gemm_nn_128x256"),
            Layout::Nn => square("gemm_nn_128x128"),
            Layout::Tn => square("gemm_tn_128x128"),
        }
    }

    pub(super) fn kernel(self) -> Kernel {
        Kernel {
            stem: "gemm",
            function: self.function,
        }
    }

    /// Tiles that cover a result \[m, n\].
    pub(super) fn count(self, m: usize, n: usize) -> usize {
        m.div_ceil(self.m) * n.div_ceil(self.n)
    }

    /// Slices that K is cut into, so that a result with a short side keeps the device busy all
    /// the same. A larger result would cost more traffic than the blocks win.
    pub(super) fn splits(self, m: usize, n: usize, k: usize) -> usize {
        if m.min(n) > SHORT {
            return 1;
        }
        let stages = k.div_ceil(STAGE);
        let wanted = (BLOCKS / self.count(m, n).max(1)).clamp(1, (stages / LEAST_STAGES).max(1));
        // Without slices that would get no stage.
        stages.div_ceil(stages.div_ceil(wanted).max(1)).max(1)
    }

    /// Bytes of shared memory.
    pub(super) fn shared(self) -> usize {
        self.stages * (self.m + self.n) * STAGE * DType::Bf16.size()
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCKS, Layout, Tile};

    /// Shared memory that a block may have.
    const A100: usize = 163 << 10;
    const L40S: usize = 99 << 10;

    #[test]
    fn the_sides_of_an_adapter_fill_the_device_and_large_results_are_not_split() {
        // dA [r, in] of 4096 tokens, dB [out, r], and a layer's forward pass.
        for (m, n, k) in [(32, 1536, 4096), (1536, 32, 4096)] {
            let tile = Tile::choose(Layout::Tn, [m, n], true, false, A100);
            let blocks = tile.splits(m, n, k) * tile.count(m, n);
            assert!((BLOCKS / 2..=BLOCKS).contains(&blocks), "{blocks}");
        }
        let tile = Tile::choose(Layout::Nt, [4096, 8960], true, false, A100);
        assert_eq!((tile.n, tile.splits(4096, 8960, 1536)), (256, 1));
    }

    #[test]
    fn tiles_fit_the_device() {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            for (m, n) in [(4096, 8960), (4096, 32), (32, 4096)] {
                for aligned in [true, false] {
                    let tile = Tile::choose(layout, [m, n], aligned, false, L40S);
                    assert!(tile.shared() <= L40S, "{tile:?}");
                }
            }
        }
    }

    #[test]
    fn every_slice_has_a_stage() {
        for k in [1, 64, 65, 1000, 4096, 100_000] {
            let tile = Tile::choose(Layout::Tn, [32, 256], true, false, A100);
            let splits = tile.splits(32, 256, k);
            let stages = k.div_ceil(64);
            assert!((splits - 1) * stages.div_ceil(splits) < stages, "{k}");
        }
    }

    #[test]
    fn a_short_result_is_cut_alike_on_devices_with_more_and_less_shared_memory() {
        for (m, n) in [(96, 25_600), (64, 30_000), (25_600, 96), (1, 32_768)] {
            let [more, less] =
                [A100, L40S].map(|shared| Tile::choose(Layout::Nt, [m, n], true, false, shared));
            assert_eq!(more, less, "{m} x {n}");
            assert_eq!(more.splits(m, n, 4096), less.splits(m, n, 4096));
        }
    }
}
