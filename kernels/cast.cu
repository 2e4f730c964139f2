// to[i] = from[i] in another float type, rounded to the nearest where it is narrower.
//
// from, to: [n], fp32 and bf16 or bf16 and fp32, 16-byte aligned; n / 8 threads rounded up.
// Least traffic: 6 n bytes.

#include "common/pack.cuh"

extern "C" __global__ void cast_f32_to_bf16(__nv_bfloat16* __restrict__ to,
                                            const float* __restrict__ from, uint64_t n) {
  const uint64_t at = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at + kWide <= n) {
    const float4 a = *reinterpret_cast<const float4*>(from + at);
    const float4 b = *reinterpret_cast<const float4*>(from + at + 4);
    store(to + at, {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w});
  } else {
    for (uint64_t i = at; i < n; ++i) to[i] = __float2bfloat16_rn(from[i]);
  }
}

extern "C" __global__ void cast_bf16_to_f32(float* __restrict__ to,
                                            const __nv_bfloat16* __restrict__ from, uint64_t n) {
  const uint64_t at = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  if (at + kWide <= n) {
    float v[kWide];
    load(v, from + at);
    *reinterpret_cast<float4*>(to + at) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(to + at + 4) = make_float4(v[4], v[5], v[6], v[7]);
  } else {
    for (uint64_t i = at; i < n; ++i) to[i] = __bfloat162float(from[i]);
  }
}
