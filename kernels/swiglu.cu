// SwiGLU (Shazeer 2020, arXiv 2002.05202): y = silu(gate) up, silu(g) = g sigmoid(g).
//
// gate, up, y and their gradients: [n] bf16, aligned to 16 bytes; arithmetic in fp32. Backward
// needs gate and up and computes the sigmoid again:
//   dgate = dy up s (1 + gate (1 - s)),  dup = dy gate s,  s = sigmoid(gate).
// Both gradients are written (=). Least traffic: 6 n bytes forward, 10 n backward.

#include "common/pack.cuh"

namespace {

// Tends to 0 and 1 without overflow: exp of a large argument is infinite, and 1 / inf is 0.
__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + __expf(-x));
}

template <int N>
__device__ __forceinline__ void forward(__nv_bfloat16* y, const __nv_bfloat16* gate,
                                        const __nv_bfloat16* up, size_t at) {
  float g[N], u[N];
  load(g, gate + at);
  load(u, up + at);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] *= g[i] * sigmoid(g[i]);
  store(y + at, u);
}

template <int N>
__device__ __forceinline__ void backward(__nv_bfloat16* dgate, __nv_bfloat16* dup,
                                         const __nv_bfloat16* dy, const __nv_bfloat16* gate,
                                         const __nv_bfloat16* up, size_t at) {
  float d[N], g[N], u[N];
  load(d, dy + at);
  load(g, gate + at);
  load(u, up + at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(g[i]);
    u[i] *= d[i] * s * (1.0f + g[i] * (1.0f - s));
    d[i] *= g[i] * s;
  }
  store(dgate + at, u);
  store(dup + at, d);
}

}  // namespace

// One thread for every kWide values; the last one takes what is left.
extern "C" __global__ void __launch_bounds__(256)
    swiglu_forward_bf16(__nv_bfloat16* __restrict__ y, const __nv_bfloat16* __restrict__ gate,
                        const __nv_bfloat16* __restrict__ up, size_t n) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at + kWide <= n) {
    forward<kWide>(y, gate, up, at);
  } else {
    for (; at < n; ++at) forward<1>(y, gate, up, at);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    swiglu_backward_bf16(__nv_bfloat16* __restrict__ dgate, __nv_bfloat16* __restrict__ dup,
                         const __nv_bfloat16* __restrict__ dy,
                         const __nv_bfloat16* __restrict__ gate,
                         const __nv_bfloat16* __restrict__ up, size_t n) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at + kWide <= n) {
    backward<kWide>(dgate, dup, dy, gate, up, at);
  } else {
    for (; at < n; ++at) backward<1>(dgate, dup, dy, gate, up, at);
  }
}
