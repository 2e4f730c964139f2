// Values of one row or tensor as a thread handles them: N bf16 or float in memory, N float in
// registers.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

// Values in one 16-byte access, the widest there is.
constexpr int kWide = 8;
// The same of fp32.
constexpr int kWideFloat = 4;

// Loads N values; `p` must be aligned to the N values.
template <int N>
__device__ __forceinline__ void load(float (&v)[N], const __nv_bfloat16* p) {
  if constexpr (N == kWide) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // A bf16 is the upper half of a float.
      v[2 * i] = __uint_as_float(words[i] << 16);
      v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else if constexpr (N == kWideFloat) {
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    v[0] = __uint_as_float(raw.x << 16), v[1] = __uint_as_float(raw.x & 0xffff0000u);
    v[2] = __uint_as_float(raw.y << 16), v[3] = __uint_as_float(raw.y & 0xffff0000u);
  } else {
    static_assert(N == 1, "one value, kWideFloat or, of bf16, kWide");
    v[0] = __bfloat162float(*p);
  }
}

// Stores 16 or 8 bytes of global memory at once. In assembly: the compiler splits stores of
// rounded pairs into narrow ones, each of which writes part of a sector.
__device__ __forceinline__ void store_words(void* p, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_words(void* p, uint2 v) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(v.x),
               "r"(v.y)
               : "memory");
}

// Stores N values to global memory, rounded to the nearest; `p` must be aligned to the N values.
template <int N>
__device__ __forceinline__ void store(__nv_bfloat16* p, const float (&v)[N]) {
  if constexpr (N == 1) {
    *p = __float2bfloat16_rn(v[0]);
  } else {
    uint32_t words[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    if constexpr (N == kWide) {
      store_words(p, make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      static_assert(N == kWideFloat, "one value, kWideFloat or kWide");
      store_words(p, make_uint2(words[0], words[1]));
    }
  }
}

// Loads N fp32 values; for N = kWideFloat `p` must be aligned to 16 bytes.
template <int N>
__device__ __forceinline__ void load(float (&v)[N], const float* p) {
  if constexpr (N == kWideFloat) {
    const float4 raw = *reinterpret_cast<const float4*>(p);
    v[0] = raw.x, v[1] = raw.y, v[2] = raw.z, v[3] = raw.w;
  } else {
    static_assert(N == 1, "one value, kWideFloat or, of bf16, kWide");
    v[0] = *p;
  }
}

// Stores N fp32 values; alignment as for load.
template <int N>
__device__ __forceinline__ void store(float* p, const float (&v)[N]) {
  if constexpr (N == kWideFloat) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  } else {
    static_assert(N == 1, "one value, kWideFloat or, of bf16, kWide");
    *p = v[0];
  }
}
