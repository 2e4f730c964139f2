//! Products on compute capability 9.0 (kernels/gemm_sm90a.cu): tiles, tensor maps and launch.

use super::cuda::{GemmArgs, Layout, LowRank, Matrix};
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

/// Clusters that an H100 runs at a time. Slices are chosen for so many whatever the device has, so
/// that the order of a sum does not depend on it.
const CLUSTERS: usize = 66;
/// Most slices of K, and the fewest stages of one.
const MOST_SPLITS: usize = 8;
const LEAST_STAGES: usize = 4;

/// Columns and stages of the tiles that are as wide as registers allow.
const WIDE: (usize, usize) = (192, 5);
/// Those of square tiles.
const SQUARE: (usize, usize) = (128, 6);

/// The grid of a kernel that computes the tiles of \[m, n\] values of a product by
/// kernels/common/gemm_wgmma.cuh, as wide as they can be and with nothing beside the ring in shared
/// memory. `None` on another architecture, and where there are few rows.
pub(crate) fn wide_grid(cuda: &CudaDevice, [m, n]: [usize; 2]) -> Option<Grid> {
    let most = most_clusters(cuda).filter(|_| m > ROWS)?;
    let (cols, stages) = WIDE;
    let clusters = clusters([m, n], cols).min(most);
    Some(Grid::of_blocks(
        PAIR * clusters,
        THREADS,
        ring(cols, stages),
    ))
}

/// Clusters that the device runs at a time; `None` on another architecture.
fn most_clusters(cuda: &CudaDevice) -> Option<usize> {
    let most = cuda.multiprocessors() / PAIR;
    (cuda.capability() == (9, 0) && most > 0).then_some(most)
}

/// Clusters whose tiles, `cols` wide, cover a result \[m, n\].
fn clusters([m, n]: [usize; 2], cols: usize) -> usize {
    m.div_ceil(PAIR * ROWS) * n.div_ceil(cols)
}

/// Bytes of a ring and its barriers.
fn ring(cols: usize, stages: usize) -> usize {
    stages * ((ROWS + cols) * STAGE * DType::Bf16.size() + BARRIERS)
}

/// A kernel, the width of the tiles that its blocks compute, and the slices of K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    function: &'static str,
    cols: usize,
    stages: usize,
    pub(super) splits: usize,
    /// Clusters to launch.
    clusters: usize,
}

impl Tile {
    /// The tile for a product on this device; `None` where kernels/gemm.cu is to compute it:
    /// on another architecture, with rows that do not begin at multiples of 16 bytes (not
    /// `aligned`), and where a side is so short that memory bounds it. With a low-rank product K
    /// is not split.
    pub(super) fn choose(
        cuda: &CudaDevice,
        layout: Layout,
        extents: [usize; 3],
        aligned: bool,
        low_rank: Option<&LowRank>,
    ) -> Option<Self> {
        let most = most_clusters(cuda).filter(|_| aligned)?;
        let tile = Self::of(layout, extents, low_rank)?;
        Some(Self {
            clusters: tile.clusters.min(most),
            ..tile
        })
    }

    fn of(layout: Layout, [m, n, k]: [usize; 3], low_rank: Option<&LowRank>) -> Option<Self> {
        if m <= ROWS || n <= SHORT || k == 0 {
            return None;
        }
        let (square, wide) = match layout {
            Layout::Nt => ("gemm_nt_wgmma_128x128", "gemm_nt_wgmma_128x192"),
            Layout::Nn => ("gemm_nn_wgmma_128x128", "gemm_nn_wgmma_128x192"),
            Layout::Tn => ("gemm_tn_wgmma_128x128", "gemm_tn_wgmma_128x192"),
        };
        let tile = |function, (cols, stages): (usize, usize), splits| Self {
            function,
            cols,
            stages,
            splits,
            clusters: clusters([m, n], cols) * splits,
        };
        if low_rank.is_some_and(|low| low.dropout.is_some()) {
            return Some(tile("gemm_nn_masked_wgmma_128x192", WIDE, 1));
        }
        let k_stages = k.div_ceil(STAGE);
        let most_splits = match low_rank {
            Some(_) => 1,
            None => (k_stages / LEAST_STAGES).clamp(1, MOST_SPLITS),
        };
        let tiles = (1..=most_splits)
            .filter(|splits| k_stages.div_ceil(k_stages.div_ceil(*splits)) == *splits)
            .flat_map(|splits| [tile(wide, WIDE, splits), tile(square, SQUARE, splits)]);
        tiles.min_by_key(|tile| tile.cost(k_stages, m * n))
    }

    /// Estimated time for a result of `values`, in units of 53 ns: what an H100 took for a stage
    /// of each tile, for the beginning and end of a tile, and for adding slices up.
    fn cost(self, k_stages: usize, values: usize) -> usize {
        let stage = if self.cols == WIDE.0 { 10 } else { 7 };
        let rounds = self.clusters.div_ceil(CLUSTERS);
        let adding = match self.splits {
            1 => 0,
            splits => 50 + 2 * splits * values * DType::F32.size() / 160_000,
        };
        rounds * (k_stages.div_ceil(self.splits) * stage + 20) + adding
    }

    /// Bytes of shared memory.
    fn shared(self) -> usize {
        ring(self.cols, self.stages) + WORKERS * SLAB
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
    use super::{CLUSTERS, Layout, Tile};

    fn tile(m: usize, n: usize, k: usize) -> Option<Tile> {
        Tile::of(Layout::Nt, [m, n, k], None)
    }

    #[test]
    fn the_tile_is_the_one_that_an_h100_was_fastest_with() {
        // Layers of a 1.5B model on 2048 tokens.
        for (n, k) in [(8960, 1536), (1536, 8960), (1536, 1536)] {
            let tile = tile(2048, n, k).unwrap();
            assert_eq!((tile.cols, tile.splits), (192, 1), "{n} {k}");
        }
        let narrow = tile(2048, 256, 1536).unwrap();
        assert_eq!((narrow.cols, narrow.splits), (128, 1));
    }

    #[test]
    fn a_long_sum_with_few_results_is_cut_into_slices_that_fill_the_device() {
        // The gradient of 512 tokens' hidden states through a head of 151 936 words.
        let tile = tile(512, 1536, 151_936).unwrap();
        assert!(tile.splits > 1);
        let rounds = tile.clusters as f64 / CLUSTERS as f64;
        assert!(rounds / rounds.ceil() > 0.9, "{tile:?}");
    }

    #[test]
    fn every_slice_has_a_stage() {
        for k in [8, 64, 65, 1000, 4096, 100_000, 151_936] {
            let splits = tile(256, 192, k).unwrap().splits;
            let stages = k.div_ceil(64);
            assert!((splits - 1) * stages.div_ceil(splits) < stages, "{k}");
        }
    }

    #[test]
    fn short_sides_are_left_to_the_other_kernels() {
        assert_eq!(tile(128, 1536, 4096), None);
        assert_eq!(tile(4096, 64, 4096), None);
        assert_eq!(tile(4096, 1536, 0), None);
    }
}
