// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = r x w with
// r = 1 / sqrt(mean(x^2) + eps) over a row.
//
// x, y, dy, dx: [T, d] bf16; w: [d] bf16, frozen; inverse_rms: [T] fp32, saved for backward
// together with x. Arithmetic in fp32. dx = r (dy w) - x r^3 / d sum(dy w x), written (=).
// Least traffic: 4 T d bytes forward, 6 T d backward: a warp keeps its row in shared memory
// between its sum and its use, so that it is read once, and the rows of a block share w.

#include <type_traits>

#include "common/async_copy.cuh"
#include "common/pack.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// N values as they lie in memory.
template <int N>
using Raw = std::conditional_t<N == kWide, uint4, __nv_bfloat16>;

template <int N>
__device__ __forceinline__ Raw<N> raw_at(const __nv_bfloat16* p) {
  return *reinterpret_cast<const Raw<N>*>(p);
}

// Stores to shared memory in one piece. In assembly: the compiler may split the store into
// narrow ones, whose lanes then meet in the same banks.
template <int N>
__device__ __forceinline__ void keep(__nv_bfloat16* to, const Raw<N>& raw) {
  if constexpr (N == kWide) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(to)),
                 "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w)
                 : "memory");
  } else {
    *to = raw;
  }
}

template <int N>
__device__ __forceinline__ void unpack(float (&v)[N], const Raw<N>& raw) {
  load(v, reinterpret_cast<const __nv_bfloat16*>(&raw));
}

// w into shared memory, by the whole block.
template <int N>
__device__ __forceinline__ void keep_weight(__nv_bfloat16* to, const __nv_bfloat16* w,
                                            unsigned d) {
  for (unsigned at = threadIdx.x * N; at < d; at += blockDim.x * N) {
    keep<N>(to + at, raw_at<N>(w + at));
  }
  __syncthreads();
}

template <int N>
__device__ __forceinline__ void forward(__nv_bfloat16* y, float* inverse_rms,
                                        const __nv_bfloat16* x, const __nv_bfloat16* w,
                                        unsigned d, float eps, __nv_bfloat16* row) {
  const unsigned first = threadIdx.x % kWarp * N;
  float sum = 0.0f;
  for (unsigned at = first; at < d; at += kWarp * N) {
    const Raw<N> raw = raw_at<N>(x + at);
    keep<N>(row + at, raw);
    float v[N];
    unpack<N>(v, raw);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i] * v[i];
  }
  const float r = rsqrtf(warp_sum(sum) / float(d) + eps);
  if (first == 0) *inverse_rms = r;
  // Each lane reads back only what it put into `row` itself.
  for (unsigned at = first; at < d; at += kWarp * N) {
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
                                         unsigned d, __nv_bfloat16* row, __nv_bfloat16* dy_row) {
  const unsigned first = threadIdx.x % kWarp * N;
  float sum = 0.0f;
  for (unsigned at = first; at < d; at += kWarp * N) {
    const Raw<N> raw_g = raw_at<N>(dy + at), raw_v = raw_at<N>(x + at);
    keep<N>(dy_row + at, raw_g);
    keep<N>(row + at, raw_v);
    float g[N], v[N], weight[N];
    unpack<N>(g, raw_g);
    unpack<N>(v, raw_v);
    load(weight, w + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += g[i] * weight[i] * v[i];
  }
  const float along = warp_sum(sum) * r * r / float(d);
  for (unsigned at = first; at < d; at += kWarp * N) {
    float g[N], v[N], weight[N];
    load(g, dy_row + at);
    load(v, row + at);
    load(weight, w + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = r * (g[i] * weight[i] - v[i] * along);
    store(dx + at, v);
  }
}

// Values from one row in shared memory to the next: each begins at a multiple of 16 bytes.
__device__ __forceinline__ unsigned padded(unsigned d) { return (d + kWide - 1) / kWide * kWide; }

}  // namespace

// A row for each warp of a block; dynamic shared memory for w and these rows of d values (each a
// 16-byte multiple).
extern "C" __global__ void __launch_bounds__(kThreads)
    rmsnorm_forward_bf16(__nv_bfloat16* __restrict__ y, float* __restrict__ inverse_rms,
                         const __nv_bfloat16* __restrict__ x,
                         const __nv_bfloat16* __restrict__ w, unsigned rows, unsigned d,
                         float eps) {
  extern __shared__ uint4 shared[];
  auto* weight = reinterpret_cast<__nv_bfloat16*>(shared);
  const unsigned warp = threadIdx.x / kWarp, t = blockIdx.x * (blockDim.x / kWarp) + warp;
  __nv_bfloat16* row = weight + (1 + warp) * padded(d);
  const size_t at = size_t(t) * d;
  if (d % kWide == 0) {
    keep_weight<kWide>(weight, w, d);
    if (t < rows) forward<kWide>(y + at, inverse_rms + t, x + at, weight, d, eps, row);
  } else {
    keep_weight<1>(weight, w, d);
    if (t < rows) forward<1>(y + at, inverse_rms + t, x + at, weight, d, eps, row);
  }
}

// The same with two rows in shared memory for each warp.
extern "C" __global__ void __launch_bounds__(kThreads)
    rmsnorm_backward_bf16(__nv_bfloat16* __restrict__ dx, const __nv_bfloat16* __restrict__ dy,
                          const __nv_bfloat16* __restrict__ x,
                          const __nv_bfloat16* __restrict__ w,
                          const float* __restrict__ inverse_rms, unsigned rows, unsigned d) {
  extern __shared__ uint4 shared[];
  auto* weight = reinterpret_cast<__nv_bfloat16*>(shared);
  const unsigned warp = threadIdx.x / kWarp, t = blockIdx.x * (blockDim.x / kWarp) + warp;
  __nv_bfloat16* row = weight + (1 + 2 * warp) * padded(d);
  __nv_bfloat16* dy_row = row + padded(d);
  const size_t at = size_t(t) * d;
  const float r = t < rows ? inverse_rms[t] : 0.0f;
  if (d % kWide == 0) {
    keep_weight<kWide>(weight, w, d);
    if (t < rows) backward<kWide>(dx + at, dy + at, x + at, weight, r, d, row, dy_row);
  } else {
    keep_weight<1>(weight, w, d);
    if (t < rows) backward<1>(dx + at, dy + at, x + at, weight, r, d, row, dy_row);
  }
}
