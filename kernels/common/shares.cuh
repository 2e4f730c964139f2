// Sums of what several blocks each have a share of, in memory in fp32, in the order of the shares.
#pragma once

#include "pack.cuh"

// Four values of the sum of `parts` shares, `size` values apart.
__device__ __forceinline__ void sum_shares(float (&sum)[kWideFloat], const float* shares,
                                           unsigned parts, size_t size) {
#pragma unroll 4
  for (unsigned part = 0; part < parts; ++part) {
    float v[kWideFloat];
    load(v, shares + part * size);
#pragma unroll
    for (int i = 0; i < kWideFloat; ++i) sum[i] += v[i];
  }
}
