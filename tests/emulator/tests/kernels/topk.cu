// The k largest of n values per block: radix select in four passes of eight bits over the
// order-preserving integer image of a float, then a compacted gather.
#include <stdint.h>

__device__ __forceinline__ uint32_t key(float f) {
  uint32_t u = __float_as_uint(f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(1024)
    topk(const float *__restrict__ x, float *__restrict__ values, int *__restrict__ indices, int n, int k) {
  __shared__ int histogram[256], warp_sums[8], need, above, ties;
  __shared__ uint32_t prefix;
  const float *row = x + (size_t)blockIdx.x * n;
  values += (size_t)blockIdx.x * k;
  indices += (size_t)blockIdx.x * k;
  int t = threadIdx.x, lane = t & 31;
  if (t == 0) prefix = 0, need = k, above = 0, ties = 0;
  __syncthreads();
  uint32_t mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (t < 256) histogram[t] = 0;
    __syncthreads();
    uint32_t p = prefix;
    for (int i = t; i < n; i += blockDim.x) {
      uint32_t u = key(row[i]);
      if ((u & mask) != p) continue;
      int bin = (u >> shift) & 255;
      unsigned same = __match_any_sync(__activemask(), bin);
      if (lane == __ffs(same) - 1) atomicAdd(&histogram[bin], __popc(same));
    }
    __syncthreads();
    if (t < 256) {
      int bin = 255 - t, count = histogram[bin], sum = count;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        int lower = __shfl_up_sync(~0u, sum, d);
        if (lane >= d) sum += lower;
      }
      if (lane == 31) warp_sums[t >> 5] = sum;
      asm volatile("bar.sync 1, 256;" ::: "memory");
      for (int w = 0; w < t >> 5; w++) sum += warp_sums[w];
      int wanted = need;
      asm volatile("bar.sync 1, 256;" ::: "memory");
      if (sum >= wanted && sum - count < wanted) {
        prefix = p | (uint32_t)bin << shift;
        need = wanted - (sum - count);
      }
    }
    __syncthreads();
    mask |= 255u << shift;
  }
  uint32_t threshold = prefix;
  int equal = need;
  for (int first = 0; first < n; first += blockDim.x) {
    int i = first + t;
    float f = i < n ? row[i] : 0.f;
    uint32_t u = key(f);
    bool greater = i < n && u > threshold, tie = i < n && u == threshold;
    unsigned ballot = __ballot_sync(~0u, greater);
    int base = 0;
    if (lane == 0 && ballot) base = atomicAdd(&above, __popc(ballot));
    base = __shfl_sync(~0u, base, 0);
    if (greater) {
      int o = base + __popc(ballot & ((1u << lane) - 1));
      values[o] = f, indices[o] = i;
    }
    if (tie) {
      int e = atomicAdd(&ties, 1);
      if (e < equal) values[k - 1 - e] = f, indices[k - 1 - e] = i;
    }
  }
}
