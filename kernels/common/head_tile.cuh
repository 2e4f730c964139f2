// Tiles of rows of one attention head in shared memory, and products of them on tensor cores.
//
// A tile holds rows of D bf16 (D = 64 or 128), D / 8 chunks of 16 bytes each. Chunk c of row r is
// at chunk position c ^ (r % 8), so that the eight rows of an 8 x 8 matrix are in different banks
// for ldmatrix, and so are the eight chunks that copies write. A tile starts at a multiple of 256
// bytes. Heads of d < D values are filled up with zeros.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>

#include "async_copy.cuh"
#include "mma.cuh"

// Two values rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 8 N columns of 16 rows as accumulators hold them, as left operands, rounded to bf16.
template <int N>
__device__ __forceinline__ void pack(uint32_t (&left)[N / 2][4], const float (&p)[N][4]) {
#pragma unroll
  for (unsigned i = 0; i < N / 2; ++i) {
#pragma unroll
    for (unsigned j = 0; j < 4; ++j) {
      const float(&pair)[4] = p[2 * i + j / 2];
      left[i][j] = pack_bf16(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
    }
  }
}

// Bytes from the start of a tile to a chunk.
template <int D>
__device__ __forceinline__ uint32_t chunk_at(unsigned row, unsigned chunk) {
  return (row * (D / 8) + (chunk ^ row % 8)) * 16;
}

// The rows of one head in global memory, d values each.
template <class T>
struct HeadRows {
  T* first;
  // Values from one row to the next.
  size_t stride;
  unsigned rows, d;
};

// Starts to bring rows first..first + kRows into a tile; rows that are not there become zero. The
// block's threads share the work. d and the stride must be multiples of 8.
template <int D, int kRows, int kThreads>
__device__ __forceinline__ void load_tile(uint32_t tile, const HeadRows<const __nv_bfloat16>& from,
                                          unsigned first) {
  // Rows that all threads copy at a time: the swizzle is the same each time.
  constexpr unsigned kChunks = D / 8, kStep = kThreads / kChunks;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);
  const unsigned row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const uint32_t to = tile + chunk_at<D>(row, chunk);
  const __nv_bfloat16* source = from.first + (first + row) * from.stride + chunk * 8;
#pragma unroll
  for (unsigned i = 0; i < kRows; i += kStep) {
    const bool valid = first + row + i < from.rows && chunk * 8 < from.d;
    // Where no byte is asked for, the address is not used.
    copy_async(to + i * D * 2, source, valid ? 16 : 0);
    source += kStep * from.stride;
  }
}

// Where this lane's row of the first fragment is, for ldmatrix. Step i along the row is at
// (address ^ 32 i), row r further down at + r * D * 2.
//
// A: 16 rows by 16 columns, as the left operand; the same walk, transposed, gives the right
// operand of a product whose sum runs over the tile's rows.
template <int D>
__device__ __forceinline__ uint32_t lane_of_a(uint32_t tile) {
  const unsigned lane = threadIdx.x % 32;
  return tile + chunk_at<D>(lane % 16, lane / 16);
}

// B: 16 rows by 16 columns, as the right operand of a product whose sum runs along the rows.
template <int D>
__device__ __forceinline__ uint32_t lane_of_b(uint32_t tile) {
  const unsigned lane = threadIdx.x % 32;
  return tile + chunk_at<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// c += A B^T: A is 16 M rows, `a` = lane_of_a; B is 8 N rows, `b` = lane_of_b.
template <int D, int M, int N>
__device__ __forceinline__ void add_product_of_rows(float (&c)[M][N][4], uint32_t a, uint32_t b) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(left[m], (a ^ 32 * i) + m * 32 * D);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ 32 * i) + n * 16 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_bf16(c[m][n], left[m], right[0], right[1]);
        mma_bf16(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// A warp's left operand in registers: 16 M rows.
template <int D, int M>
struct RowFragments {
  uint32_t at[M][D / 16][4];

  // `a` = lane_of_a.
  __device__ __forceinline__ explicit RowFragments(uint32_t a) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < D / 16; ++i) load_matrices(at[m][i], (a ^ 32 * i) + m * 32 * D);
    }
  }
};

// The same with A in registers.
template <int D, int M, int N>
__device__ __forceinline__ void add_product_of_rows(float (&c)[M][N][4],
                                                    const RowFragments<D, M>& a, uint32_t b) {
#pragma unroll
  for (int i = 0; i < D / 16; ++i) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];
      load_matrices(right, (b ^ 32 * i) + n * 16 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_bf16(c[m][n], a.at[m][i], right[0], right[1]);
        mma_bf16(c[m][n + 1], a.at[m][i], right[2], right[3]);
      }
    }
  }
}

// c += P B: P is 16 M rows by 8 N columns as accumulators hold it, rounded to bf16 here; B is
// 8 N rows, `b` = lane_of_a.
template <int D, int M, int N>
__device__ __forceinline__ void add_product(float (&c)[M][D / 8][4], const float (&p)[M][N][4],
                                            uint32_t b) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    uint32_t left[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float(&pair)[4] = p[m][i + j / 2];
        left[m][j] = pack_bf16(pair[j % 2 * 2], pair[j % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t right[4];
      load_matrices_transposed(right, (b ^ 16 * n) + i * 16 * D);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_bf16(c[m][n], left[m], right[0], right[1]);
        mma_bf16(c[m][n + 1], left[m], right[2], right[3]);
      }
    }
  }
}

// Writes the warp's 16 M rows, rounded to bf16, to rows first + row.. of a head. They go by way of
// rows `row`.. of a tile that no other warp uses any more, so that memory is written 16 bytes at a
// time.
template <int D, int M>
__device__ __forceinline__ void store_rows(const HeadRows<__nv_bfloat16>& to, unsigned first,
                                           const float (&c)[M][D / 8][4], char* tile,
                                           unsigned row) {
  const unsigned lane = threadIdx.x % 32;
  // The warp's own lanes may still be reading what these rows held.
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = chunk_at<D>(row + m * 16 + half * 8 + lane / 4, n) + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(tile + at) =
            pack_bf16(c[m][n][2 * half], c[m][n][2 * half + 1]);
      }
    }
  }
  __syncwarp();
  constexpr unsigned kStep = 32 / (D / 8);
  const unsigned chunk = lane % (D / 8), end = min(row + 16 * M, to.rows - min(first, to.rows));
  if (chunk * 8 >= to.d) return;
#pragma unroll 4
  for (unsigned r = row + lane / (D / 8); r < end; r += kStep) {
    *reinterpret_cast<uint4*>(to.first + (first + r) * to.stride + chunk * 8) =
        *reinterpret_cast<const uint4*>(tile + chunk_at<D>(r, chunk));
  }
}
