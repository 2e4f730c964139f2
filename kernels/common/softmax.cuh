// Softmax statistics of a row of fp32 logits by one block, in one pass (online softmax, Milakov
// and Gimelshein 2018, arXiv 1805.02867).
#pragma once

#include <cfloat>

#include "pack.cuh"

namespace softmax {

constexpr int kThreads = 512;

// Of a set of values: the largest, and the sum of exp(value - largest). No value gives
// {-FLT_MAX, 0}; a value that is not finite gives a sum that is not.
struct Stats {
  float max;
  float sum;
};

constexpr Stats kNone = {-FLT_MAX, 0.0f};

__device__ __forceinline__ Stats merge(const Stats& a, const Stats& b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * __expf(a.max - max) + b.sum * __expf(b.max - max)};
}

template <int N>
__device__ __forceinline__ void add(Stats& stats, const float (&v)[N]) {
  float max = stats.max;
#pragma unroll
  for (int i = 0; i < N; ++i) max = fmaxf(max, v[i]);
  float sum = stats.sum * __expf(stats.max - max);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += __expf(v[i] - max);
  stats = {max, sum};
}

// log of the sum of exp over all that the block's threads saw, returned to each. `partial` holds
// one Stats a warp and may be used again after the next __syncthreads().
__device__ __forceinline__ float log_sum_exp(Stats stats, Stats* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Stats other = {__shfl_xor_sync(0xffffffffu, stats.max, offset),
                         __shfl_xor_sync(0xffffffffu, stats.sum, offset)};
    stats = merge(stats, other);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = stats;
  __syncthreads();
  Stats all = kNone;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) all = merge(all, partial[warp]);
  return all.max + logf(all.sum);
}

}  // namespace softmax
