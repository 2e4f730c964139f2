// What the matrix products of every architecture share: the arguments of a launch, the order in
// which tiles are visited, and the dropout mask of a low-rank product.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>

#include "mma.cuh"

// One launch's operands; src/ops/gemm/cuda.rs fills it.
struct GemmArgs {
  void* out;
  const __nv_bfloat16* lhs;
  const __nv_bfloat16* rhs;
  const __nv_bfloat16* low_lhs;
  const __nv_bfloat16* low_rhs;
  const void* bias;
  const __nv_bfloat16* residual;
  const uint8_t* mask;
  unsigned lhs_stride, rhs_stride, low_lhs_stride, low_rhs_stride;
  unsigned m, n, k, low_k;
  float alpha, keep;
  unsigned flags, splits;
  unsigned unused[4];
};
static_assert(sizeof(GemmArgs) == 128, "as the launcher has it");

// Tiles are visited in bands of this many rows of tiles, so that the blocks that run at one time
// share operands in L2.
constexpr unsigned kBand = 8;

// A tile's place, in tiles.
struct TilePlace {
  unsigned row, col;
};

// Where tile number `tile` of rows x cols lies, in bands of `band` rows.
__device__ __forceinline__ TilePlace place_tile(unsigned tile, unsigned rows, unsigned cols,
                                                unsigned band) {
  const unsigned first = tile / (band * cols) * band, within = tile % (band * cols);
  const unsigned height = min(rows - first, band);
  return {first + within % height, within / height};
}

// acc = keep acc where the mask has a one, else 0, for the tile at (row, col). With kWide n is a
// multiple of 8, so that the columns of a fragment share a byte; where it is one of 32, as with
// kWords it must be, those of four share a word.
template <class T, bool kWide, bool kWords = false>
__device__ __forceinline__ void drop(float (&acc)[T::kFragmentsM][T::kFragmentsN][4],
                                     const GemmArgs& g, unsigned row, unsigned col) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  row += warp / T::kWarpsN * T::kWarpM + lane / 4;
  col += warp % T::kWarpsN * T::kWarpN;
  static_assert(T::kWarpN % 32 == 0, "whole words of the mask");
#pragma unroll
  for (int half = 0; half < 2 * T::kFragmentsM; ++half) {
    const size_t first = size_t(min(row + half * 8, g.m - 1)) * g.n;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < T::kFragmentsN; ++j) {
      const unsigned at_col = col + j * kMmaN + lane % 4 * 2;
      uint32_t bits;
      if (kWords || (kWide && g.n % 32 == 0)) {
        const auto* words = reinterpret_cast<const uint32_t*>(g.mask) + first / 32;
        if (j % 4 == 0) word = words[min(at_col, g.n - 1) / 32];
        bits = word >> at_col % 32;
      } else if constexpr (kWide) {
        bits = g.mask[(first + min(at_col, g.n - 1)) / 8] >> at_col % 8;
      } else {
        const size_t a = first + min(at_col, g.n - 1), b = first + min(at_col + 1, g.n - 1);
        bits = (g.mask[a / 8] >> a % 8 & 1) | (g.mask[b / 8] >> b % 8 & 1) << 1;
      }
      float* pair = &acc[half / 2][j][half % 2 * 2];
      pair[0] = bits & 1 ? pair[0] * g.keep : 0.0f;
      pair[1] = bits & 2 ? pair[1] * g.keep : 0.0f;
    }
  }
}
