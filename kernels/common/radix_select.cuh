// The k-th largest of keys by their digits of 8 bits, from the highest down.
#pragma once

#include <cstdint>

namespace radix_select {

constexpr unsigned kThreads = 256;

struct Shared {
  unsigned histogram[kThreads];
  unsigned sums[kThreads / 32];
  unsigned digit, above, equal;
};

// The k-th largest of n keys or, with kEarly, the first limit on the way to it that exactly k
// keys reach. `key_at(i)` gives key i, of type Key; 1 <= k <= n. The block has kThreads threads;
// the result goes to all of them.
template <class Key, bool kEarly = false, class KeyAt>
__device__ __forceinline__ Key nth(unsigned n, unsigned k, Shared& shared,
                                     const KeyAt& key_at) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Key prefix = 0, mask = 0;
  for (int shift = 8 * int(sizeof(Key)) - 8; shift >= 0; shift -= 8) {
    shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const Key key = key_at(i);
      if ((key & mask) == prefix) atomicAdd(shared.histogram + (key >> shift & 255), 1u);
    }
    __syncthreads();
    // Thread t adds up the digits from 255 down to 255 - t.
    const unsigned digit = kThreads - 1 - threadIdx.x;
    const unsigned own = shared.histogram[digit];
    unsigned sum = own;
#pragma unroll
    for (unsigned offset = 1; offset < 32; offset *= 2) {
      const unsigned lower = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += lower;
    }
    if (lane == 31) shared.sums[warp] = sum;
    __syncthreads();
    for (unsigned w = 0; w < warp; ++w) sum += shared.sums[w];
    if (sum >= k && sum - own < k) {
      shared.digit = digit;
      shared.above = sum - own;
      shared.equal = own;
    }
    __syncthreads();
    prefix |= Key(shared.digit) << shift;
    mask |= Key(255) << shift;
    k -= shared.above;
    const bool all = shared.equal == k;
    __syncthreads();
    if (kEarly && all) break;
  }
  return prefix;
}

}  // namespace radix_select
