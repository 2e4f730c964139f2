// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = r x w with
// r = 1 / sqrt(mean(x^2) + eps) over a row.
//
// x, y, dy, dx: [T, d] bf16; w: [d] bf16, frozen; inverse_rms: [T] fp32, saved for backward
// together with x. Arithmetic in fp32. dx = r (dy w) - x r^3 / d sum(dy w x), written (=).
// Least traffic: 4 T d bytes forward, 6 T d backward: a row is kept in shared memory between
// its sum and its use, so that it is read once.

#include "common/pack.cuh"
#include "common/reduce.cuh"

namespace {

constexpr int kThreads = 256;

template <int N>
__device__ __forceinline__ void forward(__nv_bfloat16* y, float* inverse_rms,
                                        const __nv_bfloat16* x, const __nv_bfloat16* w,
                                        unsigned d, float eps, __nv_bfloat16* row,
                                        float* partial) {
  float sum = 0.0f;
  for (unsigned at = threadIdx.x * N; at < d; at += kThreads * N) {
    float v[N];
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i] * v[i];
    store(row + at, v);
  }
  const float r = rsqrtf(block_sum(sum, partial) / float(d) + eps);
  if (threadIdx.x == 0) *inverse_rms = r;
  // Each thread reads back only what it put into `row` itself.
  for (unsigned at = threadIdx.x * N; at < d; at += kThreads * N) {
    float v[N], weight[N];
    load(v, row + at);
    load(weight, w + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= r * weight[i];
    store(y + at, v);
  }
}

template <int N>
__device__ __forceinline__ void backward(__nv_bfloat16* dx, const __nv_bfloat16* dy,
                                         const __nv_bfloat16* x, const __nv_bfloat16* w, float r,
                                         unsigned d, __nv_bfloat16* row, float* partial) {
  // The second half starts at a multiple of 16 bytes.
  __nv_bfloat16* dy_row = row + (d + kWide - 1) / kWide * kWide;
  float sum = 0.0f;
  for (unsigned at = threadIdx.x * N; at < d; at += kThreads * N) {
    float g[N], v[N], weight[N];
    load(g, dy + at);
    load(v, x + at);
    load(weight, w + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += g[i] * weight[i] * v[i];
    store(dy_row + at, g);
    store(row + at, v);
  }
  const float along = block_sum(sum, partial) * r * r / float(d);
  for (unsigned at = threadIdx.x * N; at < d; at += kThreads * N) {
    float g[N], v[N], weight[N];
    load(g, dy_row + at);
    load(v, row + at);
    load(weight, w + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = r * (g[i] * weight[i] - v[i] * along);
    store(dx + at, v);
  }
}

}  // namespace

// One block a row; dynamic shared memory for one row of d values (16-byte multiple).
extern "C" __global__ void __launch_bounds__(kThreads)
    rmsnorm_forward_bf16(__nv_bfloat16* __restrict__ y, float* __restrict__ inverse_rms,
                         const __nv_bfloat16* __restrict__ x,
                         const __nv_bfloat16* __restrict__ w, unsigned d, float eps) {
  extern __shared__ uint4 shared[];
  __shared__ float partial[kThreads / 32];
  auto* row = reinterpret_cast<__nv_bfloat16*>(shared);
  const size_t at = size_t(blockIdx.x) * d;
  if (d % kWide == 0) {
    forward<kWide>(y + at, inverse_rms + blockIdx.x, x + at, w, d, eps, row, partial);
  } else {
    forward<1>(y + at, inverse_rms + blockIdx.x, x + at, w, d, eps, row, partial);
  }
}

// One block a row; dynamic shared memory for two rows of d values (each a 16-byte multiple).
extern "C" __global__ void __launch_bounds__(kThreads)
    rmsnorm_backward_bf16(__nv_bfloat16* __restrict__ dx, const __nv_bfloat16* __restrict__ dy,
                          const __nv_bfloat16* __restrict__ x,
                          const __nv_bfloat16* __restrict__ w,
                          const float* __restrict__ inverse_rms, unsigned d) {
  extern __shared__ uint4 shared[];
  __shared__ float partial[kThreads / 32];
  auto* row = reinterpret_cast<__nv_bfloat16*>(shared);
  const size_t at = size_t(blockIdx.x) * d;
  const float r = inverse_rms[blockIdx.x];
  if (d % kWide == 0) {
    backward<kWide>(dx + at, dy + at, x + at, w, r, d, row, partial);
  } else {
    backward<1>(dx + at, dy + at, x + at, w, r, d, row, partial);
  }
}
