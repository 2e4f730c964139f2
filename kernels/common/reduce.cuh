// Sums over a thread block, in an order that depends on nothing but the block's size.
#pragma once

// The sum over all threads, returned to each. `threadIdx.x` counts the threads, whole warps of
// them; `partial` holds one float a warp and may be used again after the next __syncthreads().
__device__ __forceinline__ float block_sum(float value, float* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += partial[warp];
  return sum;
}
