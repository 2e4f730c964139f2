// One fault a kernel, and its repaired twin where the fault is something missing.
#include <cuda_bf16.h>
#include <assert.h>
#include <stdio.h>
#include "tensor.cuh"

extern "C" __global__ void off_by_one_store(float *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) x[i] = 1.f;  // FAULT off_by_one_store
}

extern "C" __global__ void with_syncthreads(int *x) {
  __shared__ int tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  int other = tile[127 - threadIdx.x];
  __syncthreads();
  tile[threadIdx.x] = other;
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}

// Without the second barrier a warp may read what another has overwritten.
extern "C" __global__ void missing_syncthreads(int *x) {
  __shared__ int tile[128];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  int other = tile[127 - threadIdx.x];  // FAULT missing_syncthreads
  tile[threadIdx.x] = other;
  __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}

template <bool wait> __device__ void copy(const float4 *x, float4 *y) {
  __shared__ __align__(16) float4 tile[64];
  copy16(tile + threadIdx.x, x + threadIdx.x, true);
  copy_commit();
  if (wait) copy_wait<0>();
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];  // FAULT missing_wait_group
}
extern "C" __global__ void with_wait_group(const float4 *x, float4 *y) { copy<true>(x, y); }
extern "C" __global__ void missing_wait_group(const float4 *x, float4 *y) { copy<false>(x, y); }

// The first of two groups has landed, the second has not.
extern "C" __global__ void wait_for_the_wrong_group(const float4 *x, float4 *y) {
  __shared__ __align__(16) float4 tile[128];
  copy16(tile + threadIdx.x, x + threadIdx.x, true);
  copy_commit();
  copy16(tile + 64 + threadIdx.x, x + threadIdx.x, true);
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
  y[threadIdx.x] = tile[64 + threadIdx.x];  // FAULT wrong_group
}

extern "C" __global__ void uninitialized_global_read(const float *x, float *y) {
  y[threadIdx.x] = x[threadIdx.x];  // FAULT uninitialized_global
}

extern "C" __global__ void uninitialized_shared_read(float *y) {
  __shared__ float tile[33];
  tile[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x + 1];  // FAULT uninitialized_shared
}

extern "C" __global__ void misaligned_float4(float *x) {
  float4 v = *(float4 *)(x + 1 + 4 * threadIdx.x);  // FAULT misaligned
  x[0] = v.x + v.y + v.z + v.w;
}

extern "C" __global__ void read_after_free(const float *x, float *y) { y[0] = x[threadIdx.x]; }  // FAULT freed

extern "C" __global__ void blocks_write_one_word(int *x) { x[threadIdx.x] = blockIdx.x; }  // FAULT block_race

extern "C" __global__ void block_reads_what_another_writes(int *x, int *y) {
  if (blockIdx.x == 0)
    x[threadIdx.x] = 1;  // FAULT writes_read
  else
    y[threadIdx.x] = x[threadIdx.x];  // FAULT reads_written
}

// Each block writes its part; the one that draws the last ticket adds them up. The fence before
// the ticket orders the parts; a ticket drawn before it says nothing about them.
template <bool early> __device__ void sum_in_last_block(int *parts, int *ticket, int *sum) {
  if (threadIdx.x != 0) return;
  int drawn = early ? atomicAdd(ticket, 1) : 0;
  parts[blockIdx.x] = blockIdx.x + 1;
  __threadfence();
  if (!early) drawn = atomicAdd(ticket, 1);
  if (drawn != gridDim.x - 1) return;
  __threadfence();
  int total = 0;
  for (int i = 0; i < gridDim.x; i++) total += parts[i];  // FAULT early_ticket
  *sum = total;
}
extern "C" __global__ void fence_then_ticket(int *parts, int *ticket, int *sum) {
  sum_in_last_block<false>(parts, ticket, sum);
}
extern "C" __global__ void ticket_then_fence(int *parts, int *ticket, int *sum) {
  sum_in_last_block<true>(parts, ticket, sum);
}

// Blocks own odd numbers of bytes, side by side: not a race.
extern "C" __global__ void blocks_write_neighbouring_bytes(unsigned char *x) {
  if (threadIdx.x < 5) x[blockIdx.x * 5 + threadIdx.x] += blockIdx.x;
}

extern "C" __global__ void barrier_half_the_warps_reach(int *x) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 1;
  if (threadIdx.x < 64) __syncthreads();  // FAULT barrier
  x[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_in_a_diverged_warp(int *x) {
  if (threadIdx.x % 2)
    __syncthreads();  // FAULT diverged_barrier
  else
    x[threadIdx.x] = 1;
}

extern "C" __global__ void shared_out_of_bounds(int *x, int n) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x + n] = x[threadIdx.x];  // FAULT shared_bounds
}

extern "C" __global__ void shuffle_without_a_named_lane(int *x) {
  int v = x[threadIdx.x];
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_sync(~0u, v, 0);  // FAULT absent_lane
  __syncwarp();
  x[threadIdx.x ^ 1] = v;
}

extern "C" __global__ void failing_assertion(int n) { assert(n < 5); }  // FAULT assertion

extern "C" __global__ void trapping() { __trap(); }  // FAULT trap

extern "C" __global__ void endless(volatile int *x) {
  while (*x == 0) {  // FAULT endless
  }
}

extern "C" __global__ void lanes_store_different_values(int *x) {
  __shared__ int s[2];
  s[threadIdx.x & 1] = threadIdx.x;  // FAULT lane_collision
  __syncthreads();
  x[threadIdx.x] = s[0];
}

__device__ __forceinline__ bool phase_complete(uint32_t barrier, int parity) {
  int complete;
  asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
               : "=r"(complete)
               : "r"(barrier), "r"(parity)  // FAULT missing_arrival
               : "memory");
  return complete;
}

// Copies report to an mbarrier; a phase needs `arrivals` of the 64 threads.
__device__ __forceinline__ void copy_by_mbarrier(const float *x, float *y, int arrivals) {
  __shared__ float tile[64];
  __shared__ uint64_t barrier;
  uint32_t address = shared_address(&barrier);
  if (threadIdx.x == 0) asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address), "r"(arrivals));
  __syncthreads();
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(tile + threadIdx.x)), "l"(x + threadIdx.x));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address));
  while (!phase_complete(address, 0)) {
  }
  y[threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" __global__ void with_all_arrivals(const float *x, float *y) { copy_by_mbarrier(x, y, 64); }
extern "C" __global__ void missing_arrival(const float *x, float *y) { copy_by_mbarrier(x, y, 65); }
