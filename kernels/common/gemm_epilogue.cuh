// What becomes of a tile's accumulators: out = alpha acc + bias + residual, in bf16 or fp32,
// or out += the same in fp32.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>

#include "async_copy.cuh"
#include "mma.cuh"

enum OutputFlags : unsigned {
  kOutF32 = 1,
  kBiasF32 = 2,
  kAdd = 4,
  // Rows of out, residual and bias allow accesses of four values.
  kVector = 8,
};

struct Output {
  void* data;                     // [m, n] bf16, or fp32 with kOutF32
  const void* bias;               // [n] bf16, fp32 with kBiasF32, or null
  const __nv_bfloat16* residual;  // [m, n] or null
  unsigned m, n;
  float alpha;
  unsigned flags;

  __device__ __forceinline__ float bias_at(unsigned col) const {
    return flags & kBiasF32 ? static_cast<const float*>(bias)[col]
                            : __bfloat162float(static_cast<const __nv_bfloat16*>(bias)[col]);
  }

  // Writes v times alpha and what is added to it at (row, col).
  __device__ __forceinline__ void put(unsigned row, unsigned col, float v) const {
    const size_t at = size_t(row) * n + col;
    v *= alpha;
    if (bias) v += bias_at(col);
    if (residual) v += __bfloat162float(residual[at]);
    if (flags & kOutF32) {
      float* out = static_cast<float*>(data) + at;
      *out = flags & kAdd ? *out + v : v;
    } else {
      static_cast<__nv_bfloat16*>(data)[at] = __float2bfloat16_rn(v);
    }
  }

  // The same for four values of a row.
  __device__ __forceinline__ void put4(unsigned row, unsigned col, float4 v) const {
    const size_t at = size_t(row) * n + col;
    v = make_float4(v.x * alpha, v.y * alpha, v.z * alpha, v.w * alpha);
    if (bias && flags & kBiasF32) {
      add(v, *reinterpret_cast<const float4*>(static_cast<const float*>(bias) + col));
    } else if (bias) {
      add(v, load4(static_cast<const __nv_bfloat16*>(bias) + col));
    }
    if (residual) add(v, load4(residual + at));
    if (flags & kOutF32) {
      float4* out = reinterpret_cast<float4*>(static_cast<float*>(data) + at);
      if (flags & kAdd) add(v, *out);
      *out = v;
    } else {
      const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y),
                                       __floats2bfloat162_rn(v.z, v.w)};
      *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(data) + at) =
          *reinterpret_cast<const uint2*>(pairs);
    }
  }

 private:
  static __device__ __forceinline__ void add(float4& v, float4 w) {
    v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
  }

  static __device__ __forceinline__ float4 load4(const __nv_bfloat16* p) {
    const uint2 raw = *reinterpret_cast<const uint2*>(p);
    // A bf16 is the upper half of a float.
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                       __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
  }
};

// Stores two floats to shared memory at once. In assembly: the compiler may split the store of a
// float2 into two, whose lanes then meet in the same banks.
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(shared_address(to)),
               "f"(a), "f"(b)
               : "memory");
}

// Writes a warp's accumulators, which belong to the tile at (row, col). They pass through the
// warp's own part of shared memory, 16 rows at a time, so that whole sectors of a row are written
// together. `shared` holds 16 x (T::kWarpN + 8) floats a warp.
template <class T>
__device__ __forceinline__ void write_tile(
    const float (&acc)[T::kFragmentsM][T::kFragmentsN][4], const Output& out, unsigned row,
    unsigned col, float* shared) {
  // Eight floats of padding put the four rows of a store's phase into distinct banks.
  constexpr int kStride = T::kWarpN + 8;
  constexpr int kLanes = T::kWarpN / 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* slab = shared + warp * kMmaM * kStride;
  row += warp / T::kWarpsN * T::kWarpM;
  col += warp % T::kWarpsN * T::kWarpN + lane % kLanes * 4;
#pragma unroll
  for (int i = 0; i < T::kFragmentsM; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < T::kFragmentsN; ++j) {
      float* to = slab + lane / 4 * kStride + j * kMmaN + lane % 4 * 2;
      store_pair(to, acc[i][j][0], acc[i][j][1]);
      store_pair(to + 8 * kStride, acc[i][j][2], acc[i][j][3]);
    }
    __syncwarp();
#pragma unroll
    for (int r = lane / kLanes; r < kMmaM; r += 32 / kLanes) {
      const float4 v = *reinterpret_cast<const float4*>(slab + r * kStride + lane % kLanes * 4);
      const unsigned at_row = row + i * kMmaM + r;
      if (at_row >= out.m) continue;
      if (out.flags & kVector) {
        if (col < out.n) out.put4(at_row, col, v);
      } else {
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (col + c < out.n) out.put(at_row, col + c, values[c]);
        }
      }
    }
  }
}
