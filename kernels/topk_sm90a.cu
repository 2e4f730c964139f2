// The product of topk.cu's encoder for Hopper, with the same lists; method: common/gemm_wgmma.cuh.
// Least work: 2 T (m - first) d FLOP.

#include "common/gemm_wgmma.cuh"
#include "common/topk_lists.cuh"

namespace {

using ListTile = Tile<128, 192, 16, 192, 5>;

// Tokens, latents after the first, and the width, for one product without slices.
struct Extents {
  unsigned m, n, k;
  static constexpr unsigned low_k = 0, splits = 1;
};

}  // namespace

// As topk_extend_lists, with maps of x and of the rows of W' from `first` on.
extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    topk_extend_lists_wgmma_128x192(
        uint64_t* __restrict__ lists, unsigned* __restrict__ counts,
        const float* __restrict__ thresholds, const float* __restrict__ shifted, unsigned tokens,
        unsigned first, unsigned m, unsigned d, unsigned length,
        const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Maps maps{x, w};
  const Lists to{lists, counts, thresholds, shifted, tokens, m, length};
  compute_tiles<ListTile, Layout::kNt, 0>(
      Extents{tokens, m - first, d}, maps, maps, shared, [](Sums<ListTile>&, const Place&) {},
      [&](const Sums<ListTile>& acc, const Place& at) {
        to.extend<ListTile>(acc, at.row, first + at.col);
      });
}
