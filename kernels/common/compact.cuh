// The places where a condition holds, in ascending order, found by one block.
#pragma once

// Writes to `out` every i < n for which keep(i), ascending; returns their number to all threads.
// `sums` holds one word a warp; the block is whole warps.
template <class Keep>
__device__ __forceinline__ unsigned compact(unsigned* out, unsigned n, unsigned* sums,
                                            const Keep& keep) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned before = 0;
  for (unsigned first = 0; first < n; first += blockDim.x) {
    const unsigned at = first + threadIdx.x;
    const bool kept = at < n && keep(at);
    const unsigned ballot = __ballot_sync(0xffffffffu, kept);
    if (lane == 0) sums[warp] = __popc(ballot);
    __syncthreads();
    unsigned place = before + __popc(ballot & ((1u << lane) - 1));
    for (unsigned w = 0; w < blockDim.x / 32; ++w) {
      if (w < warp) place += sums[w];
      before += sums[w];
    }
    if (kept) out[place] = at;
    __syncthreads();
  }
  return before;
}
