// Language features and NVIDIA's own headers, whose results are their authors' claims.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdio.h>

namespace cg = cooperative_groups;

__constant__ float table[4] = {1.f, 2.f, 3.f, 4.f};
__device__ int counter = 7;
__device__ int *pointer = &counter;

__device__ __noinline__ float polynomial(float x, int n, float *last) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum = sum * x + table[i & 3];
  *last = sum - 1.f;
  return sum;
}
extern "C" __global__ void calls(float *x) {
  float last, v = polynomial(x[threadIdx.x], 4, &last);
  x[threadIdx.x] = v + last;
}

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
extern "C" __global__ void recursion(int *x) { x[threadIdx.x] = fibonacci(threadIdx.x); }

typedef int (*function)(int);
__device__ int add_one(int x) { return x + 1; }
__device__ int twice(int x) { return 2 * x; }
__device__ int negate(int x) { return -x; }
__device__ function functions[3] = {add_one, twice, negate};
extern "C" __global__ void pointers_to_functions(int *x) { x[threadIdx.x] = functions[threadIdx.x % 3](x[threadIdx.x]); }

extern "C" __global__ void globals(int *x) {
  if (threadIdx.x == 0) atomicAdd(pointer, 3);
  __syncthreads();
  x[threadIdx.x] = counter;
}

extern "C" __global__ void local_array(int *x, int n) {
  int squares[16];
  for (int i = 0; i < 16; i++) squares[i] = i * i;
  for (int i = 0; i < n; i++) squares[(threadIdx.x + i) % 16] += 100;
  x[threadIdx.x] = squares[threadIdx.x % 16];
}

extern "C" __global__ void choices(int *x) {
  int v = x[threadIdx.x];
  switch (v) {
    case 0: v = 11; break;
    case 1: v = v * 7 + 5; break;
    case 2: v = threadIdx.x; break;
    case 3: v = 33; break;
    case 4: v = -1; break;
    case 5: v = 99; break;
    default: v = 1000;
  }
  x[threadIdx.x] = v;
}

extern "C" __global__ void prints(int n) {
  if (threadIdx.x == 0) printf("n=%d f=%.2f s=%s u=%u x=%04x %%\n", n, 1.5, "text", 7u, 255);
}

extern "C" __global__ void group_reductions(const int *x, int *out) {
  auto block = cg::this_thread_block();
  auto warp = cg::tiled_partition<32>(block);
  auto eight = cg::tiled_partition<8>(block);
  int t = threadIdx.x, v = x[t];
  out[t] = cg::reduce(warp, v, cg::plus<int>());
  out[t + 64] = cg::reduce(eight, v, cg::greater<int>());
  out[t + 128] = eight.shfl_down(v, 2);
  out[t + 192] = __syncthreads_count(v > 10);
  if (t % 2) {
    auto active = cg::coalesced_threads();
    out[t + 256] = active.size() * 100 + active.thread_rank();
  } else {
    out[t + 256] = __reduce_add_sync(0x55555555, v);
  }
}

extern "C" __global__ void atomics(int *i, unsigned *u, float *f, double *d, unsigned long long *l, __half2 *h,
                                   __nv_bfloat16 *b) {
  atomicAdd(i, 1);
  atomicMax(i + 1, (int)threadIdx.x - 5);
  atomicMin(i + 2, -(int)threadIdx.x);
  atomicInc(u, 20);
  atomicDec(u + 1, 9);
  atomicXor(u + 2, 1u << (threadIdx.x % 32));
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicMax(l, (unsigned long long)threadIdx.x << 33);
  atomicAdd(h, __floats2half2_rn(1.f, 2.f));
  atomicAdd(b, __float2bfloat16(1.f));
  unsigned old = u[3], assumed;
  do {
    assumed = old;
    old = atomicCAS(u + 3, assumed, assumed + threadIdx.x);
  } while (old != assumed);
}

// Lanes of one warp wait for each other's lock: needs threads that make progress on their own.
extern "C" __global__ void spin_lock(int *lock, volatile int *count) {
  while (atomicCAS(lock, 0, 1) != 0) {
  }
  *count = *count + 1;
  __threadfence();
  atomicExch(lock, 0);
}

// One bf16 operation of the header a column; the host computes the same in float64.
extern "C" __global__ void bf16_header(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  __nv_bfloat16 x = a[i], y = b[i];
  out[i] = __bfloat162float(__hadd(x, y));
  out[i + n] = __bfloat162float(__hmul(x, y));
  out[i + 2 * n] = __bfloat162float(__hmax(x, y));
  out[i + 3 * n] = __hlt(x, y) ? 1.f : 0.f;
  out[i + 4 * n] = (float)__bfloat162int_rz(x);
  __nv_bfloat162 pair = __hsub2(__halves2bfloat162(x, y), __halves2bfloat162(y, x));
  out[i + 5 * n] = __low2float(pair);
  out[i + 6 * n] = __high2float(pair);
  out[i + 7 * n] = __bfloat162float(__hneg(x));
}

extern "C" __global__ void math(const float *x, float *out, int n) {
  int i = threadIdx.x;
  float v = x[i];
  out[i] = expf(v);
  out[i + n] = logf(v + 3.f);
  out[i + 2 * n] = tanhf(v);
  out[i + 3 * n] = erff(v);
  out[i + 4 * n] = sinf(1000.f * v);
  out[i + 5 * n] = (float)exp((double)v);
  out[i + 6 * n] = powf(v + 2.f, 2.5f);
  out[i + 7 * n] = fmodf(v, 0.3f);
}

extern "C" __global__ void wide_index(unsigned char *x) {
  x[blockIdx.z * 24 + blockIdx.y * 8 + (threadIdx.z * 2 + threadIdx.y) * 2 + threadIdx.x] =
      blockIdx.z * 100 + blockIdx.y * 10 + threadIdx.z * 4 + threadIdx.y * 2 + threadIdx.x;
}

// Every block adds up what all blocks wrote before the grid's barrier, twice.
extern "C" __global__ void grid_sum(const int *x, int *partial, int *total) {
  cg::grid_group grid = cg::this_grid();
  for (int round = 0; round < 2; round++) {
    if (threadIdx.x == 0) partial[blockIdx.x] = x[blockIdx.x] + round;
    grid.sync();
    if (threadIdx.x == 0) {
      int sum = 0;
      for (int i = 0; i < gridDim.x; i++) sum += partial[i];
      total[blockIdx.x * 2 + round] = sum;
    }
    grid.sync();
  }
}
