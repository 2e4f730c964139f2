// Sums over gathered rows: what the decoder and the gradients of a sparse autoencoder are made
// of. A block owns the result, its threads own columns of it, and the pairs (row, scale) go
// through shared memory, so that a row is read whole and once.
#pragma once

#include "pack.cuh"

namespace gather {

// Columns of a thread: 16 bytes of fp32, 8 of bf16.
constexpr int kColumns = kWideFloat;
// Pairs in shared memory at a time; a block has at least as many threads.
constexpr unsigned kStage = 32;
constexpr int kMaxThreads = 512;

struct Stage {
  unsigned row[kStage];
  float scale[kStage];
};

// sum += scale * (row - centre) over the staged pairs in their order, for the columns from `at`.
template <int N, class T>
__device__ __forceinline__ void add_rows(float (&sum)[N], const Stage& stage, unsigned pairs,
                                         const T* matrix, const float (&centre)[N], unsigned d,
                                         unsigned at) {
#pragma unroll 4
  for (unsigned p = 0; p < pairs; ++p) {
    float row[N];
    load(row, matrix + size_t(stage.row[p]) * d + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += stage.scale[p] * (row[i] - centre[i]);
  }
}

// One float of each warp for each staged pair; a warp's lie side by side, as the threads that add
// them up read them.
using Partial = float[kMaxThreads / 32][kStage];

// Dot products of the staged rows with `own`, of this thread's columns alone, added up over each
// warp into `partial`; and sum += scale * row. All threads take part, those without columns
// (`mine` false) with zeros.
template <int N, class T>
__device__ __forceinline__ void add_and_dot(float (&sum)[N], Partial& partial,
                                            const float (&own)[N], const Stage& stage,
                                            unsigned pairs, const T* matrix, unsigned d,
                                            unsigned at, bool mine) {
#pragma unroll 4
  for (unsigned p = 0; p < pairs; ++p) {
    float row[N] = {};
    if (mine) load(row, matrix + size_t(stage.row[p]) * d + at);
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] += stage.scale[p] * row[i];
      dot += own[i] * row[i];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      dot += __shfl_xor_sync(0xffffffffu, dot, offset);
    }
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][p] = dot;
  }
}

// The dot product of one staged pair over the block's columns.
__device__ __forceinline__ float total(const Partial& partial, unsigned pair) {
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp][pair];
  return sum;
}

}  // namespace gather
