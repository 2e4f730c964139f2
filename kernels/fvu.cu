// Fraction of variance unexplained, sum |x - y|^2 / sum |x - mean(x)|^2 over tokens, and what
// belongs to it: squared distances, their gradient, and sink tokens (norm of ten times the
// batch's median and more).
//
// x, y: [T, d] fp32 or bf16 each, as `wide_x` and `wide_y` say; mean: [d] fp32, a y of stride 0;
// keep: [T] fp32, 1 for a token that counts and else 0, or null where all count. A few values
// of a row are summed in fp32, the rest in fp64, in a fixed order. Everything is written (=).
// Least traffic: x and y once; backward x and y once and the gradient in bf16.

#include <cstdint>

#include "common/compact.cuh"
#include "common/pack.cuh"
#include "common/radix_select.cuh"
#include "common/reduce.cuh"

namespace {

constexpr unsigned kThreads = radix_select::kThreads;

// N values of a matrix in either type.
template <int N>
__device__ __forceinline__ void load_any(float (&v)[N], const void* matrix, size_t at,
                                         bool wide) {
  if (wide) {
    load(v, static_cast<const float*>(matrix) + at);
  } else {
    load(v, static_cast<const __nv_bfloat16*>(matrix) + at);
  }
}

template <int N>
__device__ __forceinline__ double distance(const void* x, bool wide_x, const void* y, bool wide_y,
                                           size_t stride, const float* keep, unsigned rows,
                                           unsigned per_block, unsigned d) {
  const unsigned first = blockIdx.x * per_block, last = min(rows, first + per_block);
  double sum = 0.0;
  for (unsigned at = threadIdx.x * N; at < d; at += kThreads * N) {
    float v[N];
    load_any(v, y, first * stride + at, wide_y);
#pragma unroll 2
    for (unsigned r = first; r < last; ++r) {
      float u[N], part = 0.0f;
      load_any(u, x, size_t(r) * d + at, wide_x);
      if (stride != 0 && r != first) load_any(v, y, r * stride + at, wide_y);
#pragma unroll
      for (int i = 0; i < N; ++i) part += (u[i] - v[i]) * (u[i] - v[i]);
      if (keep == nullptr || keep[r] != 0.0f) sum += part;
    }
  }
  return sum;
}

template <int N, class Out>
__device__ __forceinline__ void difference(Out* out, const void* x, bool wide_x, const void* y,
                                           bool wide_y, float scale, size_t at) {
  float u[N], v[N];
  load_any(u, x, at, wide_x);
  load_any(v, y, at, wide_y);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] = scale * (u[i] - v[i]);
  store(out + at, u);
}

// One thread for every kWideFloat values; the last one takes what is left.
template <class Out>
__device__ __forceinline__ void all_differences(Out* out, const void* x, bool wide_x,
                                                const void* y, bool wide_y, float scale,
                                                size_t n) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at + kWideFloat <= n) {
    difference<kWideFloat>(out, x, wide_x, y, wide_y, scale, at);
  } else {
    for (; at < n; ++at) difference<1>(out, x, wide_x, y, wide_y, scale, at);
  }
}

template <int N>
__device__ __forceinline__ float squared_norm(const void* x, bool wide, size_t start,
                                              unsigned d) {
  float sum = 0.0f;
  for (unsigned at = threadIdx.x % 32 * N; at < d; at += 32 * N) {
    float v[N];
    load_any(v, x, start + at, wide);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i] * v[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

}  // namespace

// Squared distances of `per_block` rows a block: partial [blocks].
extern "C" __global__ void __launch_bounds__(kThreads)
    fvu_distance(double* __restrict__ partial, const void* __restrict__ x, unsigned wide_x,
                 const void* __restrict__ y, unsigned wide_y, size_t stride,
                 const float* __restrict__ keep, unsigned rows, unsigned per_block, unsigned d) {
  __shared__ double warps[kThreads / 32];
  const double own =
      d % kWideFloat == 0
          ? distance<kWideFloat>(x, wide_x, y, wide_y, stride, keep, rows, per_block, d)
          : distance<1>(x, wide_x, y, wide_y, stride, keep, rows, per_block, d);
  const double sum = block_sum(own, warps);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// The sum of the partial sums. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    fvu_total(double* __restrict__ total, const double* __restrict__ partial, unsigned parts) {
  __shared__ double warps[kThreads / 32];
  double own = 0.0;
  for (unsigned i = threadIdx.x; i < parts; i += kThreads) own += partial[i];
  const double sum = block_sum(own, warps);
  if (threadIdx.x == 0) *total = sum;
}

// out = scale (x - y), [n].
extern "C" __global__ void __launch_bounds__(256)
    fvu_difference_bf16(__nv_bfloat16* __restrict__ out, const void* __restrict__ x,
                        unsigned wide_x, const void* __restrict__ y, unsigned wide_y, float scale,
                        size_t n) {
  all_differences(out, x, wide_x, y, wide_y, scale, n);
}

extern "C" __global__ void __launch_bounds__(256)
    fvu_difference_f32(float* __restrict__ out, const void* __restrict__ x, unsigned wide_x,
                       const void* __restrict__ y, unsigned wide_y, float scale, size_t n) {
  all_differences(out, x, wide_x, y, wide_y, scale, n);
}

// Norms of the rows. One warp a row.
extern "C" __global__ void __launch_bounds__(kThreads)
    fvu_norms(float* __restrict__ norms, const void* __restrict__ x, unsigned wide_x,
              unsigned rows, unsigned d) {
  const unsigned row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const size_t start = size_t(row) * d;
  const float sum = d % kWideFloat == 0 ? squared_norm<kWideFloat>(x, wide_x, start, d)
                                        : squared_norm<1>(x, wide_x, start, d);
  if (threadIdx.x % 32 == 0) norms[row] = sqrtf(sum);
}

// keep: 0 where the norm is above zero and at least `factor` times the lower median norm, else 1;
// kept: the tokens to keep, ascending; number: [1], how many they are. T is at least 1. One block.
extern "C" __global__ void __launch_bounds__(kThreads)
    fvu_sinks(float* __restrict__ keep, unsigned* __restrict__ kept,
              unsigned* __restrict__ number, const float* __restrict__ norms, unsigned tokens,
              float factor) {
  __shared__ radix_select::Shared shared;
  // Norms are not negative: they sort as their bits, NaN last.
  const auto bits = [=](unsigned i) { return __float_as_uint(norms[i]); };
  // The lower median is the one with (T - 1) / 2 below it.
  const unsigned from_top = tokens - (tokens - 1) / 2;
  const uint32_t median = radix_select::nth<uint32_t>(tokens, from_top, shared, bits);
  const float limit = __uint_as_float(median) * factor;
  for (unsigned i = threadIdx.x; i < tokens; i += kThreads) {
    keep[i] = norms[i] >= limit && norms[i] > 0.0f ? 0.0f : 1.0f;
  }
  __syncthreads();
  const unsigned count =
      compact(kept, tokens, shared.sums, [=](unsigned i) { return keep[i] != 0.0f; });
  if (threadIdx.x == 0) *number = count;
}

// out [blocks, d]: row kept[i] of x for each block i; rows of `words` 16-bit words.
extern "C" __global__ void __launch_bounds__(kThreads)
    fvu_rows(uint16_t* __restrict__ out, const uint16_t* __restrict__ x,
             const unsigned* __restrict__ kept, size_t words) {
  const uint16_t* from = x + kept[blockIdx.x] * words;
  uint16_t* to = out + blockIdx.x * words;
  if (words % 8 == 0) {
    for (size_t at = threadIdx.x * 8; at < words; at += kThreads * 8) {
      *reinterpret_cast<uint4*>(to + at) = *reinterpret_cast<const uint4*>(from + at);
    }
  } else {
    for (size_t at = threadIdx.x; at < words; at += kThreads) to[at] = from[at];
  }
}
