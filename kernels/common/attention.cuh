// What forward and backward of causal grouped-query attention share. A block owns kRows rows of one
// head of one sequence, queries or keys, and goes through the rows of the other side that they
// see, or that see them, in steps.
//
// Matrices are [T, heads d] bf16 with T = batch seq_len and d a multiple of 8 up to D; the kernels
// are made for D = 64 and 128. Query head h reads key/value head h / (heads / kv_heads).
// doc_starts: [T] u32, or null: row i of a sequence sees keys start_i <= j <= i, start_i = 0
// without it. Statistics of rows are [batch, heads, seq_len] fp32.
#pragma once

#include <type_traits>

#include "head_tile.cuh"

// Rows that a block owns.
constexpr unsigned kRows = 128;

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

struct Shape {
  unsigned seq_len, heads, kv_heads, d;
  // Scores times this are in base 2: log2(e) / sqrt(d).
  float scale;
};

// One head's rows of one sequence in a [T, heads d] matrix.
template <class T>
__device__ __forceinline__ HeadRows<T> rows_of(T* matrix, const Shape& s, unsigned seq,
                                               unsigned head, unsigned heads) {
  return {matrix + (size_t(seq) * s.seq_len * heads + head) * s.d, size_t(heads) * s.d, s.seq_len,
          s.d};
}

// Position of a head's first row in a [batch, heads, seq_len] array.
__device__ __forceinline__ size_t statistics_at(const Shape& s, unsigned seq, unsigned head) {
  return (size_t(seq) * s.heads + head) * s.seq_len;
}

__device__ __forceinline__ const unsigned* starts_of(const unsigned* doc_starts, const Shape& s,
                                                     unsigned seq) {
  return doc_starts ? doc_starts + size_t(seq) * s.seq_len : nullptr;
}

// What a block owns: kRows rows of one head of one sequence. Blocks with the most work come first:
// late queries, early keys.
struct Owner {
  unsigned first, head, seq;

  __device__ __forceinline__ Owner(const Shape& s, unsigned heads, bool late_first, unsigned block,
                                   unsigned blocks) {
    const unsigned tiles = (s.seq_len + kRows - 1) / kRows, others = blocks / tiles;
    const unsigned tile = block / others, other = block % others;
    first = (late_first ? tiles - 1 - tile : tile) * kRows;
    head = other % heads;
    seq = other / heads;
  }
};

// The first of the keys that any of the block's queries sees. `starts` is the sequence's; the
// block's part of it goes to `here`, kRows words and one more for each warp.
template <int kThreads>
__device__ __forceinline__ unsigned first_visible(unsigned* here, const unsigned* starts,
                                                  unsigned first, unsigned seq_len) {
  if (starts == nullptr) return 0;
  unsigned found = first;
  for (unsigned row = threadIdx.x; row < kRows; row += kThreads) {
    here[row] = first + row < seq_len ? starts[first + row] : first;
    found = min(found, here[row]);
  }
  unsigned* least = here + kRows;
  found = __reduce_min_sync(0xffffffffu, found);
  if (threadIdx.x % 32 == 0) least[threadIdx.x / 32] = found;
  __syncthreads();
  for (unsigned warp = 0; warp < kThreads / 32; ++warp) found = min(found, least[warp]);
  return found;
}

// Row of accumulator entry (m, half) within the warp's rows.
__device__ __forceinline__ unsigned row_of(int m, int half) {
  return m * 16 + half * 8 + threadIdx.x % 32 / 4;
}

// Column of accumulator entry (n, j).
__device__ __forceinline__ unsigned column_of(int n, int j) {
  return n * 8 + threadIdx.x % 4 * 2 + j;
}

// Scores that a query may not see become minus infinity: rows are queries, columns are keys.
// `starts`, where there are documents, has a start for each row.
template <int M, int N>
__device__ __forceinline__ void mask(float (&s)[M][N][4], unsigned query, unsigned key,
                                     const unsigned* starts) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = row_of(m, half), start = starts ? starts[row] : 0;
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const unsigned column = key + column_of(n, j);
          if (column > query + row || column < start) s[m][n][2 * half + j] = -INFINITY;
        }
      }
    }
  }
}

// The rows that a warp multiplies from the left in every step: in registers where there is room,
// else their address in shared memory.
template <bool kHeld, int D, int M>
using LeftRows = std::conditional_t<kHeld, RowFragments<D, M>, uint32_t>;
