//! Products on compute capability 9.0 (kernels/gemm_sm90a.cu): tiles, tensor maps and launch.

use super::cuda::{GemmArgs, Layout, Matrix};
use super::tile::{SHORT, STAGE};
use crate::device::CudaDevice;
use crate::device::cuda::{Arg, Grid, Kernel};
use crate::error::Result;
use crate::tensor::DType;

/// Rows of the result that a thread block computes at a time.
const ROWS: usize = 128;
/// Thread blocks of a cluster; they compute tiles one below the other.
const PAIR: usize = 2;
/// Threads of a block: two warpgroups that multiply, and one that copies.
const THREADS: u32 = 384;
/// Warps that multiply, and the bytes through which each of them writes: 16 rows of 40 floats.
const WORKERS: usize = 8;
const SLAB: usize = 16 * 40 * 4;
/// Two barriers a stage.
const BARRIERS: usize = 2 * 8;

/// A kernel and the width of the tiles that its blocks compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    function: &'static str,
    cols: usize,
    stages: usize,
    /// Pairs of tiles that cover the result, and those computed at a time.
    pairs: usize,
    clusters: usize,
}

impl Tile {
    /// The tile for a product on this device; `None` where kernels/gemm.cu is to compute it:
    /// on another architecture, with rows that do not begin at multiples of 16 bytes (not
    /// `aligned`), and where a side is so short that memory bounds it.
    pub(super) fn choose(
        cuda: &CudaDevice,
        layout: Layout,
        extents: [usize; 3],
        aligned: bool,
        masked: bool,
    ) -> Option<Self> {
        let suits = aligned && cuda.capability() == (9, 0);
        let clusters = cuda.multiprocessors() / PAIR;
        suits.then(|| Self::of(layout, extents, masked, clusters))?
    }

    fn of(layout: Layout, [m, n, k]: [usize; 3], masked: bool, clusters: usize) -> Option<Self> {
        if m <= ROWS || n <= SHORT || k == 0 || clusters == 0 {
            return None;
        }
        let tile = |function, cols: usize, stages| {
            let pairs = m.div_ceil(PAIR * ROWS) * n.div_ceil(cols);
            Self {
                function,
                cols,
                stages,
                pairs,
                clusters: clusters.min(pairs),
            }
        };
        let (square, wide) = match layout {
            Layout::Nt => ("gemm_nt_wgmma_128x128", "gemm_nt_wgmma_128x256"),
            Layout::Nn => ("gemm_nn_wgmma_128x128", "gemm_nn_wgmma_128x256"),
            Layout::Tn => ("gemm_tn_wgmma_128x128", "gemm_tn_wgmma_128x256"),
        };
        if masked {
            return Some(tile("gemm_nn_masked_wgmma_128x128", 128, 6));
        }
        let (square, wide) = (tile(square, 128, 6), tile(wide, 256, 4));
        // The narrow tile reads a third more of L2 for the same work.
        let cost = |t: Tile, weight: usize| t.pairs.div_ceil(clusters) * t.cols * weight;
        Some(match cost(square, 9) < cost(wide, 8) {
            true => square,
            false => wide,
        })
    }

    /// Bytes of shared memory.
    fn shared(self) -> usize {
        let stage = (ROWS + self.cols) * STAGE * DType::Bf16.size();
        self.stages * (stage + BARRIERS) + WORKERS * SLAB
    }

    /// Computes what `args` says from lhs, rhs and, where there is one, the low-rank product's.
    ///
    /// # Errors
    /// What encoding a map or a launch can fail with.
    ///
    /// # Safety
    /// As for [`CudaDevice::launch`]; the extents of `args` are those of the operands.
    pub(super) unsafe fn launch(
        self,
        cuda: &CudaDevice,
        args: GemmArgs,
        operands: &[Matrix],
    ) -> Result<()> {
        let maps = operands.iter().map(|o| o.block_map(cuda));
        let maps = maps.collect::<Result<Vec<Arg>>>()?;
        let mut all = vec![Arg::Struct(bytemuck::cast(args))];
        // Without a low-rank product its maps are not read.
        all.extend(maps.iter().cycle().take(4));
        let kernel = Kernel {
            stem: "gemm_sm90a",
            function: self.function,
        };
        let grid = Grid::of_blocks(PAIR * self.clusters, THREADS, self.shared());
        // SAFETY: the caller vouches for the arguments; the maps lead to the operands.
        unsafe { cuda.launch(kernel, grid, &all) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Layout, Tile};

    fn tile(m: usize, n: usize, k: usize) -> Option<Tile> {
        // 132 multiprocessors.
        Tile::of(Layout::Nt, [m, n, k], false, 66)
    }

    #[test]
    fn a_wide_tile_is_taken_unless_it_leaves_multiprocessors_without_work() {
        // 560 pairs of 256 columns: nine rounds. 96 and 192 pairs: two rounds, three of half.
        assert_eq!(tile(4096, 8960, 1536).unwrap().cols, 256);
        assert_eq!(tile(4096, 1536, 8960).unwrap().cols, 128);
        assert_eq!(tile(4096, 256, 1536).unwrap().cols, 128);
    }

    #[test]
    fn short_sides_are_left_to_the_other_kernels() {
        assert_eq!(tile(128, 1536, 4096), None);
        assert_eq!(tile(4096, 64, 4096), None);
        assert_eq!(tile(4096, 1536, 0), None);
    }
}
