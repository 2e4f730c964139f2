// Causal grouped-query flash attention, forward (Dao et al., 2022), head size 64: 64 queries
// and 64 keys a tile, four warps of 16 rows, online softmax in base 2. Layout [batch, time,
// head, 64]; LSE[batch, head, time] is the natural log-sum-exp.
#include "tensor.cuh"

constexpr int D = 64, BM = 64, BN = 64;

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * D + ((chunk ^ (row & 7)) << 3); }

__device__ __forceinline__ void load_tile(__nv_bfloat16 *s, const __nv_bfloat16 *g, int stride, int first, int rows) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int c = threadIdx.x + i * 128, r = c >> 3, chunk = c & 7;
    bool valid = first + r < rows;
    copy16(s + swizzled(r, chunk), valid ? g + (size_t)r * stride + chunk * 8 : g, valid);
  }
}

extern "C" __global__ void __launch_bounds__(128)
    flash_forward(const __nv_bfloat16 *__restrict__ Q, const __nv_bfloat16 *__restrict__ K,
                  const __nv_bfloat16 *__restrict__ V, __nv_bfloat16 *__restrict__ O, float *__restrict__ LSE, int S,
                  int H, int HK, float scale) {
  __shared__ __align__(128) __nv_bfloat16 sQ[BM * D], sK[2][BN * D], sV[2][BN * D];
  int lane = threadIdx.x & 31, w = threadIdx.x >> 5, h = blockIdx.y, b = blockIdx.z, q0 = blockIdx.x * BM;
  int hk = h / (H / HK);
  const __nv_bfloat16 *q = Q + ((size_t)(b * S + q0) * H + h) * D;
  const __nv_bfloat16 *k = K + ((size_t)b * S * HK + hk) * D, *v = V + ((size_t)b * S * HK + hk) * D;
  float base2 = scale * 1.4426950408889634f;
  load_tile(sQ, q, H * D, q0, S);
  load_tile(sK[0], k, HK * D, 0, S);
  load_tile(sV[0], v, HK * D, 0, S);
  copy_commit();
  uint32_t fq[4][4];
  float o[8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
  int tiles = min((q0 + BM + BN - 1) / BN, (S + BN - 1) / BN);
  for (int j = 0; j < tiles; j++) {
    if (j + 1 < tiles) {
      load_tile(sK[(j + 1) & 1], k + (size_t)(j + 1) * BN * HK * D, HK * D, (j + 1) * BN, S);
      load_tile(sV[(j + 1) & 1], v + (size_t)(j + 1) * BN * HK * D, HK * D, (j + 1) * BN, S);
    }
    copy_commit();
    copy_wait<1>();
    __syncthreads();
    if (j == 0)
#pragma unroll
      for (int t = 0; t < 4; t++) ldmatrix4(fq[t], sQ + swizzled(w * 16 + (lane & 15), t * 2 + (lane >> 4)));
    float s[8][4] = {};
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint32_t f[4];
        ldmatrix4(f, sK[j & 1] + swizzled(n * 16 + (lane & 7) + ((lane >> 4) << 3), t * 2 + ((lane >> 3) & 1)));
        mma_bf16(s[2 * n], fq[t], f);
        mma_bf16(s[2 * n + 1], fq[t], f + 2);
      }
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        int column = j * BN + n * 8 + (lane & 3) * 2 + (e & 1), row = q0 + w * 16 + (lane >> 2) + (e >> 1) * 8;
        s[n][e] = column > row || column >= S ? -INFINITY : s[n][e] * base2;
      }
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float top = m[r];
#pragma unroll
      for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      float shrink = exp2f(m[r] - top), sum = 0;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        s[n][2 * r] = exp2f(s[n][2 * r] - top);
        s[n][2 * r + 1] = exp2f(s[n][2 * r + 1] - top);
        sum += s[n][2 * r] + s[n][2 * r + 1];
        o[n][2 * r] *= shrink;
        o[n][2 * r + 1] *= shrink;
      }
      l[r] = l[r] * shrink + sum;
      m[r] = top;
    }
#pragma unroll
    for (int t = 0; t < 4; t++) {
      uint32_t p[4] = {pack_bf16(s[2 * t][0], s[2 * t][1]), pack_bf16(s[2 * t][2], s[2 * t][3]),
                       pack_bf16(s[2 * t + 1][0], s[2 * t + 1][1]), pack_bf16(s[2 * t + 1][2], s[2 * t + 1][3])};
#pragma unroll
      for (int n = 0; n < 4; n++) {
        uint32_t f[4];
        ldmatrix4_trans(f, sV[j & 1] + swizzled(t * 16 + (lane & 15), n * 2 + (lane >> 4)));
        mma_bf16(o[2 * n], p, f);
        mma_bf16(o[2 * n + 1], p, f + 2);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    l[r] += __shfl_xor_sync(~0u, l[r], 1);
    l[r] += __shfl_xor_sync(~0u, l[r], 2);
    int row = q0 + w * 16 + (lane >> 2) + r * 8;
    if (row >= S) continue;
    float inverse = 1.f / l[r];
#pragma unroll
    for (int n = 0; n < 8; n++)
      *(uint32_t *)(O + ((size_t)(b * S + row) * H + h) * D + n * 8 + (lane & 3) * 2) =
          pack_bf16(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
    if ((lane & 3) == 0) LSE[(size_t)(b * H + h) * S + row] = (m[r] + log2f(l[r])) * 0.6931471805599453f;
  }
}
