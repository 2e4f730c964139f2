// The sum of two gradients that reach one value: sum = a + b for activations, sum += term for
// parameters.
//
// a, b, sum: [n] bf16, aligned to 16 bytes; the addition is in fp32, sum is written (=). Least
// traffic: 6 n bytes. In fp32, sum and term: [n], aligned to 16 bytes, sum is added to (+=); 12 n
// bytes.

#include "common/pack.cuh"

namespace {

template <int N>
__device__ __forceinline__ void add(__nv_bfloat16* sum, const __nv_bfloat16* a,
                                    const __nv_bfloat16* b, size_t at) {
  float u[N], v[N];
  load(u, a + at);
  load(v, b + at);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] += v[i];
  store(sum + at, u);
}

template <int N>
__device__ __forceinline__ void add_to(float* sum, const float* term, size_t at) {
  float u[N], v[N];
  load(u, sum + at);
  load(v, term + at);
#pragma unroll
  for (int i = 0; i < N; ++i) u[i] += v[i];
  store(sum + at, u);
}

}  // namespace

// One thread for every kWide values; the last one takes what is left.
extern "C" __global__ void __launch_bounds__(256)
    add_bf16(__nv_bfloat16* __restrict__ sum, const __nv_bfloat16* __restrict__ a,
             const __nv_bfloat16* __restrict__ b, size_t n) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at + kWide <= n) {
    add<kWide>(sum, a, b, at);
  } else {
    for (; at < n; ++at) add<1>(sum, a, b, at);
  }
}

// One thread for every kWideFloat values; the last one takes what is left.
extern "C" __global__ void __launch_bounds__(256)
    add_f32(float* __restrict__ sum, const float* __restrict__ term, size_t n) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at + kWideFloat <= n) {
    add_to<kWideFloat>(sum, term, at);
  } else {
    for (; at < n; ++at) add_to<1>(sum, term, at);
  }
}
