// The matrix products of gemm.cu for Hopper, with the same arguments, layouts and epilogues, where
// the rows of all operands begin at multiples of 16 bytes. Method: common/gemm_wgmma.cuh.
//
// With splits > 1 the K axis is cut into slices whose fp32 results lie one behind the other in out,
// for gemm_sum. In the kernel `masked` the low-rank product passes through dropout's mask; elsewhere
// mask is null.
// Least work: 2 m n (k + low_k) FLOP; least traffic: each operand once, out once.

#include "common/gemm_args.cuh"
#include "common/gemm_epilogue.cuh"
#include "common/gemm_wgmma.cuh"

namespace {

// Columns that pass through a warp's part of shared memory at a time.
constexpr int kSlab = 32;

// kMasked: the low-rank product passes through the mask. A kernel of its own, because ptxas makes
// the products wait for each other where their accumulators may or may not change in between.
template <class T, Layout kLayout, bool kMasked = false>
__device__ __forceinline__ void gemm(const GemmArgs& g, const Maps& low, const Maps& whole) {
  constexpr unsigned kSlabBytes = T::kWarps * kMmaM * (kSlab + 8) * 4;
  extern __shared__ __align__(1024) unsigned char shared[];
  float* slabs = reinterpret_cast<float*>(shared + Ring<T>::kBytes);
  compute_tiles<T, kLayout, kSlabBytes>(
      g, low, whole, shared,
      [&](Sums<T>& acc, const Place& at) {
        if constexpr (kMasked) drop<T, true>(acc, g, at.row, at.col);
      },
      [&](const Sums<T>& acc, const Place& at) {
        Output out{g.out, g.bias, g.residual, g.m, g.n, g.alpha, g.flags};
        if (at.slice > 0) out.data = static_cast<float*>(g.out) + size_t(at.slice) * g.m * g.n;
        write_tile<T, kSlab>(acc, out, at.row, at.col, slabs);
      });
}

using Square = Tile<128, 128, 16, 128, 6>;
using Wide = Tile<128, 192, 16, 192, 5>;

}  // namespace

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_nt_wgmma_128x128(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Square, Layout::kNt>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_nn_wgmma_128x128(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Square, Layout::kNn>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_tn_wgmma_128x128(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Square, Layout::kTn>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_nt_wgmma_128x192(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Wide, Layout::kNt>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_nn_wgmma_128x192(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Wide, Layout::kNn>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_tn_wgmma_128x192(const __grid_constant__ GemmArgs g,
                          const __grid_constant__ TensorMap lhs,
                          const __grid_constant__ TensorMap rhs,
                          const __grid_constant__ TensorMap low_lhs,
                          const __grid_constant__ TensorMap low_rhs) {
  gemm<Wide, Layout::kTn>(g, {low_lhs, low_rhs}, {lhs, rhs});
}

extern "C" __global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    gemm_nn_masked_wgmma_128x192(const __grid_constant__ GemmArgs g,
                                 const __grid_constant__ TensorMap lhs,
                                 const __grid_constant__ TensorMap rhs,
                                 const __grid_constant__ TensorMap low_lhs,
                                 const __grid_constant__ TensorMap low_rhs) {
  gemm<Wide, Layout::kNn, true>(g, {low_lhs, low_rhs}, {lhs, rhs});
}
