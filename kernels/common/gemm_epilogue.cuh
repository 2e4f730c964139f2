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

// What a tile's results need: rounding or nothing beside the factor, as most do, or whatever the
// flags say. Told apart once a tile, since the tests cost more than the work.
enum class Writes { kBf16, kF32, kAny };

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

  __device__ __forceinline__ Writes writes() const {
    if (bias || residual || (flags & (kVector | kAdd)) != kVector) return Writes::kAny;
    return flags & kOutF32 ? Writes::kF32 : Writes::kBf16;
  }

  // The same for four values of a row.
  template <Writes kWrites = Writes::kAny>
  __device__ __forceinline__ void put4(unsigned row, unsigned col, float4 v) const {
    const size_t at = size_t(row) * n + col;
    v = make_float4(v.x * alpha, v.y * alpha, v.z * alpha, v.w * alpha);
    if constexpr (kWrites == Writes::kBf16) return store4(at, v);
    if constexpr (kWrites == Writes::kF32) {
      *reinterpret_cast<float4*>(static_cast<float*>(data) + at) = v;
      return;
    }
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
      store4(at, v);
    }
  }

 private:
  __device__ __forceinline__ void store4(size_t at, float4 v) const {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(v.x, v.y),
                                     __floats2bfloat162_rn(v.z, v.w)};
    *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(data) + at) =
        *reinterpret_cast<const uint2*>(pairs);
  }

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

// Writes two neighbours at once. An instruction of its own, because nvcc splits some such stores.
__device__ __forceinline__ void store_pair(uint32_t to, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

// Writes a warp's accumulators as write_tile, below, says.
template <class T, int kSlab, Writes kWrites>
__device__ __forceinline__ void write_tile_as(
    const float (&acc)[T::kFragmentsM][T::kFragmentsN][4], const Output& out, unsigned row,
    unsigned col, float* shared) {
  // Eight floats of padding put the four rows of a store's phase into distinct banks.
  constexpr int kStride = kSlab + 8;
  constexpr int kLanes = kSlab / 4;
  constexpr int kSlabs = T::kWarpN / kSlab;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* slab = shared + warp * kMmaM * kStride;
  const uint32_t to = shared_address(slab + lane / 4 * kStride + lane % 4 * 2);
  row += warp / T::kWarpsN * T::kWarpM;
  col += warp % T::kWarpsN * T::kWarpN + lane % kLanes * 4;
#pragma unroll
  for (int i = 0; i < T::kFragmentsM * kSlabs; ++i) {
    const unsigned at_col = col + i % kSlabs * kSlab;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kSlab / kMmaN; ++j) {
      const float(&v)[4] = acc[i / kSlabs][i % kSlabs * (kSlab / kMmaN) + j];
      const uint32_t at = to + j * kMmaN * 4;
      store_pair(at, v[0], v[1]);
      store_pair(at + 8 * kStride * 4, v[2], v[3]);
    }
    __syncwarp();
#pragma unroll
    for (int r = lane / kLanes; r < kMmaM; r += 32 / kLanes) {
      const float4 v = *reinterpret_cast<const float4*>(slab + r * kStride + lane % kLanes * 4);
      const unsigned at_row = row + i / kSlabs * kMmaM + r;
      if (at_row >= out.m) continue;
      if (kWrites != Writes::kAny || out.flags & kVector) {
        if (at_col < out.n) out.put4<kWrites>(at_row, at_col, v);
      } else {
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (at_col + c < out.n) out.put(at_row, at_col + c, values[c]);
        }
      }
    }
  }
}

// Writes a warp's accumulators, which belong to the tile at (row, col). They pass through the
// warp's own part of shared memory, 16 rows of kSlab columns at a time, so that whole sectors of a
// row are written together. `shared` holds 16 x (kSlab + 8) floats a warp.
template <class T, int kSlab = T::kWarpN>
__device__ __forceinline__ void write_tile(
    const float (&acc)[T::kFragmentsM][T::kFragmentsN][4], const Output& out, unsigned row,
    unsigned col, float* shared) {
  switch (out.writes()) {
    case Writes::kBf16:
      return write_tile_as<T, kSlab, Writes::kBf16>(acc, out, row, col, shared);
    case Writes::kF32:
      return write_tile_as<T, kSlab, Writes::kF32>(acc, out, row, col, shared);
    case Writes::kAny:
      return write_tile_as<T, kSlab, Writes::kAny>(acc, out, row, col, shared);
  }
}
