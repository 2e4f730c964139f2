// C[M,N] = alpha A[M,K] B[N,K]^T in bf16 with fp32 accumulation: tiles of 128 x 128 x 32, a
// four-stage cp.async pipeline, eight warps of 64 x 32, shared memory swizzled by 16-byte chunks.
#include "tensor.cuh"

constexpr int BM = 128, BN = 128, BK = 32, STAGES = 4;

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * BK + ((chunk ^ ((row >> 1) & 3)) << 3); }

extern "C" __global__ void __launch_bounds__(256)
    gemm_bf16(const __nv_bfloat16 *__restrict__ A, const __nv_bfloat16 *__restrict__ B, __nv_bfloat16 *__restrict__ C,
              int M, int N, int K, float alpha) {
  extern __shared__ __align__(128) __nv_bfloat16 tiles[];
  __nv_bfloat16 *sA = tiles, *sB = tiles + STAGES * BM * BK;
  int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, wm = warp & 1, wn = warp >> 1;
  int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  float acc[4][4][4] = {};

  auto load = [&](int step, int stage) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int c = tid + i * 256, row = c >> 2, chunk = c & 3, k = step * BK + chunk * 8;
      bool inA = m0 + row < M && k < K, inB = n0 + row < N && k < K;
      copy16(sA + stage * BM * BK + swizzled(row, chunk), A + (inA ? (size_t)(m0 + row) * K + k : 0), inA);
      copy16(sB + stage * BN * BK + swizzled(row, chunk), B + (inB ? (size_t)(n0 + row) * K + k : 0), inB);
    }
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (s < steps) load(s, s);
    copy_commit();
  }
  for (int step = 0; step < steps; step++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    int next = step + STAGES - 1;
    if (next < steps) load(next, next % STAGES);
    copy_commit();
    const __nv_bfloat16 *a = sA + (step % STAGES) * BM * BK, *b = sB + (step % STAGES) * BN * BK;
#pragma unroll
    for (int kk = 0; kk < 2; kk++) {
      uint32_t fa[4][4], fb[4][2];
#pragma unroll
      for (int i = 0; i < 4; i++)
        ldmatrix4(fa[i], a + swizzled(wm * 64 + i * 16 + (lane & 15), kk * 2 + (lane >> 4)));
#pragma unroll
      for (int j = 0; j < 2; j++) {
        uint32_t t[4];
        ldmatrix4(t, b + swizzled(wn * 32 + j * 16 + (lane & 7) + ((lane >> 4) << 3), kk * 2 + ((lane >> 3) & 1)));
        fb[2 * j][0] = t[0], fb[2 * j][1] = t[1], fb[2 * j + 1][0] = t[2], fb[2 * j + 1][1] = t[3];
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) mma_bf16(acc[i][j], fa[i], fb[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int row = m0 + wm * 64 + i * 16 + (lane >> 2), column = n0 + wn * 32 + j * 8 + (lane & 3) * 2;
      if (column >= N) continue;
      float *c = acc[i][j];
      if (row < M) *(uint32_t *)(C + (size_t)row * N + column) = pack_bf16(alpha * c[0], alpha * c[1]);
      if (row + 8 < M) *(uint32_t *)(C + (size_t)(row + 8) * N + column) = pack_bf16(alpha * c[2], alpha * c[3]);
    }
}
