// The lists that pre-activations of latents join which may be among a token's k largest.
#pragma once

#include <cstdint>

#include "mma.cuh"

// Values above zero sort as their bits; of equal ones the lower latent is the larger key.
__device__ __forceinline__ uint64_t key_of(float value, unsigned latent) {
  return uint64_t(__float_as_uint(value)) << 32 | uint32_t(~latent);
}
__device__ __forceinline__ float value_of(uint64_t key) {
  return __uint_as_float(unsigned(key >> 32));
}
__device__ __forceinline__ unsigned latent_of(uint64_t key) { return ~unsigned(key); }

// keys [tokens, length]; counts [tokens], which go on (+=); thresholds [tokens]; shifted: the bias
// [m].
struct Lists {
  uint64_t* keys;
  unsigned* counts;
  const float *thresholds, *shifted;
  unsigned tokens, m, length;

  // Of a tile of products, tokens in its rows from `row` on and latents in its columns from `col`
  // on: what with the bias exceeds its token's threshold joins the token's list, as long as there
  // is room. The order within a list is any: the selection from it does not depend on it.
  template <class T>
  __device__ __forceinline__ void extend(const float (&acc)[T::kFragmentsM][T::kFragmentsN][4],
                                         unsigned row, unsigned col) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned from_token = row + warp / T::kWarpsN * T::kWarpM + lane / 4;
    const unsigned from_latent = col + warp % T::kWarpsN * T::kWarpN + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2 * T::kFragmentsM; ++half) {
      const unsigned token = from_token + half * 8;
      if (token >= tokens) continue;
      const float threshold = thresholds[token];
#pragma unroll
      for (int i = 0; i < 2 * T::kFragmentsN; ++i) {
        const unsigned latent = from_latent + i / 2 * kMmaN + i % 2;
        if (latent >= m) continue;
        const float v = acc[half / 2][i / 2][half % 2 * 2 + i % 2] + shifted[latent];
        // Written so that NaN passes.
        if (!(v <= threshold)) {
          const unsigned place = atomicAdd(counts + token, 1u);
          if (place < length) keys[size_t(token) * length + place] = key_of(v, latent);
        }
      }
    }
  }
};
