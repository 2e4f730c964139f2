// Sums over a thread block, in an order that depends on nothing but the block's size.
#pragma once

// The sum over all threads, returned to each. `threadIdx.x` counts the threads, whole warps of
// them; `partial` holds one value a warp and may be used again after the next __syncthreads().
template <class T>
__device__ __forceinline__ T block_sum(T value, T* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  return sum;
}
