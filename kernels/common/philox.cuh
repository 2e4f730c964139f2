// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), the same
// words as on the host.
#pragma once

#include <cstdint>

// A stream of random words: what it is for (key and the upper counter words) is the launcher's.
struct Stream {
  uint32_t key0, key1, high0, high1, high2;

  // Words 4 x block .. 4 x block + 3.
  __device__ __forceinline__ uint4 words(uint32_t block) const {
    uint4 counter = make_uint4(block, high0, high1, high2);
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(counter.x) * 0xD2511F53u;
      const uint64_t b = uint64_t(counter.z) * 0xCD9E8D57u;
      counter = make_uint4(uint32_t(b >> 32) ^ counter.y ^ k0, uint32_t(b),
                           uint32_t(a >> 32) ^ counter.w ^ k1, uint32_t(a));
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return counter;
  }

  // What dropout keeps of elements 8 x block .. 8 x block + 7: bit i is set where half i % 2, lower
  // first, of word i / 2 is not below the threshold.
  __device__ __forceinline__ uint32_t kept(uint32_t block, uint32_t threshold) const {
    const uint4 drawn = words(block);
    const uint32_t all[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bits |= uint32_t((all[i / 2] >> 16 * (i % 2) & 0xffff) >= threshold) << i;
    }
    return bits;
  }
};
