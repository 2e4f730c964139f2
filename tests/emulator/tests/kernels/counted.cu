// Kernels whose counters are known by hand.
extern "C" __global__ void copy_coalesced(const float *x, float *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i];
}

extern "C" __global__ void copy_strided(const float *x, float *y) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[8 * i];
}

extern "C" __global__ void copy_float4(const float4 *x, float4 *y) { y[threadIdx.x] = x[threadIdx.x]; }

template <int stride> __device__ void strided(float *y) {
  __shared__ float tile[32 * stride];
  for (int i = 0; i < stride; i++) tile[threadIdx.x + 32 * i] = i;
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x * stride];
}
extern "C" __global__ void shared_stride_1(float *y) { strided<1>(y); }
extern "C" __global__ void shared_stride_2(float *y) { strided<2>(y); }
extern "C" __global__ void shared_stride_32(float *y) { strided<32>(y); }
extern "C" __global__ void shared_stride_33(float *y) { strided<33>(y); }

// 16 bytes a lane: eight lanes go together, so this row-wise pattern is free of conflicts ...
extern "C" __global__ void shared_float4(float4 *y) {
  __shared__ float4 tile[32];
  tile[threadIdx.x] = make_float4(1, 2, 3, 4);
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x];
}

// ... and a stride of 128 bytes puts all eight lanes of a phase on the same four banks.
extern "C" __global__ void shared_float4_columns(float4 *y) {
  __shared__ float4 tile[32 * 8];
  for (int i = 0; i < 8; i++) tile[threadIdx.x + 32 * i] = make_float4(1, 2, 3, 4);
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x * 8];
}

extern "C" __global__ void atomics_and_barriers(int *x) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd_block(&s, (int)threadIdx.x);
  __syncthreads();
  atomicExch(&x[threadIdx.x], s);
}

extern "C" __global__ void fma_chain(float *x, int n) {
  float v = x[threadIdx.x];
#pragma unroll 1
  for (int i = 0; i < n; i++) v = fmaf(v, 0.5f, 1.f);
  x[threadIdx.x] = v;
}
