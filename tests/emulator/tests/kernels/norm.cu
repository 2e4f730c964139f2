// RMSNorm followed by rotate-half RoPE, one row per block; and SwiGLU.
#include <cuda_bf16.h>

union Chunk {
  uint4 bits;
  __nv_bfloat162 pair[4];
};

extern "C" __global__ void rmsnorm_rope(const __nv_bfloat16 *__restrict__ x, const __nv_bfloat16 *__restrict__ weight,
                                        __nv_bfloat16 *__restrict__ y, const int *__restrict__ position, int channels,
                                        int head, float epsilon, float theta) {
  __shared__ float part[32];
  extern __shared__ float row[];
  int r = blockIdx.x, t = threadIdx.x;
  const uint4 *source = (const uint4 *)(x + (size_t)r * channels);
  float sum = 0;
  for (int i = t; i < channels / 8; i += blockDim.x) {
    Chunk c;
    c.bits = __ldg(source + i);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float2 f = __bfloat1622float2(c.pair[j]);
      row[i * 8 + 2 * j] = f.x, row[i * 8 + 2 * j + 1] = f.y;
      sum = fmaf(f.x, f.x, sum), sum = fmaf(f.y, f.y, sum);
    }
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if ((t & 31) == 0) part[t >> 5] = sum;
  __syncthreads();
  if (t < 32) {
    sum = t < blockDim.x >> 5 ? part[t] : 0.f;
#pragma unroll
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (t == 0) part[0] = rsqrtf(sum / channels + epsilon);
  }
  __syncthreads();
  float inverse = part[0];
  for (int i = t; i < channels; i += blockDim.x) row[i] *= inverse * __bfloat162float(weight[i]);
  __syncthreads();
  int half = head / 2;
  float p = (float)position[r];
  for (int i = t; i < channels / 2; i += blockDim.x) {
    int h = i / half, d = i % half;
    float frequency = powf(theta, -2.f * d / head), sine, cosine;
    sincosf(p * frequency, &sine, &cosine);
    float a = row[h * head + d], b = row[h * head + half + d];
    y[(size_t)r * channels + h * head + d] = __float2bfloat16(a * cosine - b * sine);
    y[(size_t)r * channels + h * head + half + d] = __float2bfloat16(b * cosine + a * sine);
  }
}

extern "C" __global__ void swiglu(const uint4 *__restrict__ gate, const uint4 *__restrict__ up, uint4 *__restrict__ out,
                                  int chunks) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= chunks) return;
  Chunk a, b, c;
  a.bits = __ldg(gate + i), b.bits = __ldg(up + i);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float2 x = __bfloat1622float2(a.pair[j]), z = __bfloat1622float2(b.pair[j]);
    c.pair[j] = __floats2bfloat162_rn(x.x / (1.f + __expf(-x.x)) * z.x, x.y / (1.f + __expf(-x.y)) * z.y);
  }
  out[i] = c.bits;
}
