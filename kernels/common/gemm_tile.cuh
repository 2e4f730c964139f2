// One tile of a matrix product per block: bf16 operands stream through a ring of stages in shared
// memory (cp.async), fragments come by ldmatrix, products by mma into fp32 registers.
//
// Rows of a stage are split into 16-byte chunks whose place is permuted by the row (XOR), so that
// the 8 rows an ldmatrix phase reads and the 8 chunks a copy phase writes lie in distinct banks.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>

#include "async_copy.cuh"
#include "mma.cuh"

// lhs rhs^T, lhs rhs, lhs^T rhs; all matrices are row-major in memory.
enum class Layout { kNt, kNn, kTn };

// The K extent of a stage.
constexpr int kStageK = 64;
// bf16 values in 16 bytes.
constexpr int kChunk = 8;

// Sizes of a block's tile, of a warp's part of it, and the depth of the ring.
template <int kM_, int kN_, int kWarpM_, int kWarpN_, int kStages_>
struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kStages = kStages_;
  static constexpr int kWarpsN = kN / kWarpN;
  static constexpr int kWarps = kM / kWarpM * kWarpsN;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kFragmentsM = kWarpM / kMmaM;
  static constexpr int kFragmentsN = kWarpN / kMmaN;
};

// An operand as it lies in memory: `rows` rows of `cols` values, `stride` values apart.
struct Operand {
  const __nv_bfloat16* data;
  unsigned rows, cols, stride;
};

// Where a stage keeps kExtent x kStageK values of an operand whose rows run along K, or
// kStageK x kExtent values of one whose rows run across it.
template <int kExtent, bool kAlongK>
struct Stage {
  static constexpr int kRows = kAlongK ? kExtent : kStageK;
  static constexpr int kChunks = (kAlongK ? kStageK : kExtent) / kChunk;
  static constexpr int kBytes = kExtent * kStageK * 2;
  static_assert(kChunks == 4 || kChunks % 8 == 0, "rows of 64 bytes or multiples of 128");

  // Byte offset of a chunk.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    const int turn = kChunks == 4 ? row / 2 % 4 : row % 8;
    return (row * kChunks + (chunk ^ turn)) * 16;
  }

  // Starts copying the part of `from` whose first value is at (row, col). Without kWide, rows
  // may lie at any address, and the copy is done when it returns.
  template <int kThreads, bool kWide>
  static __device__ __forceinline__ void fill(uint32_t to, const Operand& from, unsigned row,
                                              unsigned col) {
    static_assert(kRows * kChunks % kThreads == 0, "an equal share for each thread");
#pragma unroll
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
      const int at_chunk = threadIdx.x + i * kThreads;
      const int r = at_chunk / kChunks, c = at_chunk % kChunks;
      const unsigned from_row = row + r, from_col = col + c * kChunk;
      const bool inside = from_row < from.rows && from_col < from.cols;
      const unsigned count = inside ? min(from.cols - from_col, unsigned(kChunk)) : 0;
      const __nv_bfloat16* source =
          from.data + (inside ? size_t(from_row) * from.stride + from_col : 0);
      if constexpr (kWide) {
        copy_async(to + at(r, c), source, 2 * count);
      } else {
        copy_values(to + at(r, c), source, count);
      }
    }
  }

  static __device__ __forceinline__ void copy_values(uint32_t to, const __nv_bfloat16* from,
                                                     unsigned count) {
    const auto* values = reinterpret_cast<const unsigned short*>(from);
    uint32_t words[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const uint32_t low = 2 * i < count ? values[2 * i] : 0;
      const uint32_t high = 2 * i + 1 < count ? values[2 * i + 1] : 0;
      words[i] = high << 16 | low;
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }

  // The 16 x 16 fragment of a left operand at (extent, k).
  static __device__ __forceinline__ void lhs(uint32_t (&r)[4], uint32_t stage, int extent, int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (kAlongK) {
      load_matrices(r, stage + at(extent + lane % 16, k / kChunk + lane / 16));
    } else {
      const int row = k + lane % 8 + lane / 16 * 8;
      load_matrices_transposed(r, stage + at(row, extent / kChunk + lane / 8 % 2));
    }
  }

  // Two 16 x 8 fragments of a right operand, at (k, extent) and (k, extent + 8).
  static __device__ __forceinline__ void rhs(uint32_t (&r)[4], uint32_t stage, int extent, int k) {
    const int lane = threadIdx.x % 32;
    if constexpr (kAlongK) {
      const int row = extent + lane % 8 + lane / 16 * 8;
      load_matrices(r, stage + at(row, k / kChunk + lane / 8 % 2));
    } else {
      load_matrices_transposed(r, stage + at(k + lane % 16, extent / kChunk + lane / 16));
    }
  }
};

// A product's operands, seen from the tile at (row, col) of its result.
template <class T, Layout kLayout, bool kWide>
struct Product {
  using Lhs = Stage<T::kM, kLayout != Layout::kTn>;
  using Rhs = Stage<T::kN, kLayout == Layout::kNt>;
  static constexpr int kStageBytes = Lhs::kBytes + Rhs::kBytes;
  using Accumulator = float[T::kFragmentsM][T::kFragmentsN][4];

  Operand lhs, rhs;

  __device__ __forceinline__ unsigned k() const {
    return kLayout == Layout::kTn ? lhs.rows : lhs.cols;
  }

  // Starts filling a stage with K from `k` on.
  __device__ __forceinline__ void fill(uint32_t stage, unsigned row, unsigned col,
                                       unsigned k) const {
    constexpr bool kLhsAlongK = kLayout != Layout::kTn, kRhsAlongK = kLayout == Layout::kNt;
    Lhs::template fill<T::kThreads, kWide>(stage, lhs, kLhsAlongK ? row : k,
                                           kLhsAlongK ? k : row);
    Rhs::template fill<T::kThreads, kWide>(stage + Lhs::kBytes, rhs, kRhsAlongK ? col : k,
                                           kRhsAlongK ? k : col);
  }

  struct Fragments {
    uint32_t lhs[T::kFragmentsM][4];
    uint32_t rhs[T::kFragmentsN / 2][4];
  };

  static __device__ __forceinline__ void load(Fragments& f, uint32_t stage, int k) {
    const int warp = threadIdx.x / 32;
    const int m = warp / T::kWarpsN * T::kWarpM, n = warp % T::kWarpsN * T::kWarpN;
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; ++i) Lhs::lhs(f.lhs[i], stage, m + i * kMmaM, k);
#pragma unroll
    for (int j = 0; j < T::kFragmentsN / 2; ++j) {
      Rhs::rhs(f.rhs[j], stage + Lhs::kBytes, n + j * 2 * kMmaN, k);
    }
  }

  // acc += the stage's products over its first `depth` values of K, rounded up to kMmaK. The
  // fragments of the next step load while this step multiplies.
  static __device__ __forceinline__ void multiply(Accumulator& acc, uint32_t stage,
                                                  unsigned depth) {
    Fragments f[2];
    load(f[0], stage, 0);
#pragma unroll
    for (int step = 0; step < kStageK / kMmaK; ++step) {
      if (step * kMmaK >= depth) break;
      if (step + 1 < kStageK / kMmaK) load(f[(step + 1) % 2], stage, (step + 1) * kMmaK);
      const Fragments& now = f[step % 2];
#pragma unroll
      for (int i = 0; i < T::kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < T::kFragmentsN; ++j) {
          mma_bf16(acc[i][j], now.lhs[i], now.rhs[j / 2][j % 2 * 2], now.rhs[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
};

// acc += first, then `between(acc)`, then acc += stages begin..end of second, for the tile at
// (row, col). `shared` holds T::kStages stages and may be used for other things afterwards.
template <class P, class T, class Between>
__device__ __forceinline__ void accumulate(typename P::Accumulator& acc, const P& first,
                                           const P& second, unsigned begin, unsigned end,
                                           unsigned row, unsigned col, uint32_t shared,
                                           Between between) {
  const unsigned ahead = (first.k() + kStageK - 1) / kStageK;
  const unsigned total = ahead + end - begin;
  const auto fill = [&](unsigned index) {
    const uint32_t stage = shared + index % T::kStages * P::kStageBytes;
    const bool in_first = index < ahead;
    const P from = in_first ? first : second;
    const unsigned at = in_first ? index : begin + index - ahead;
    if (index < total) from.fill(stage, row, col, at * kStageK);
    copy_commit();
  };
  for (unsigned index = 0; index < T::kStages - 1; ++index) fill(index);
  const auto step = [&](unsigned index, unsigned depth) {
    copy_wait<T::kStages - 2>();
    __syncthreads();
    // The stage that all warps have left before the barrier is the next to fill.
    fill(index + T::kStages - 1);
    P::multiply(acc, shared + index % T::kStages * P::kStageBytes, depth);
  };
  for (unsigned i = 0; i < ahead; ++i) step(i, first.k() - i * kStageK);
  if (ahead > 0) between(acc);
  for (unsigned i = begin; i < end; ++i) step(ahead + i - begin, second.k() - i * kStageK);
  copy_wait<0>();
  __syncthreads();
}
