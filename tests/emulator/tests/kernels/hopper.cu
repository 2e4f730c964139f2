// C = A B^T in bf16 for Hopper: a producer warpgroup fills a four-stage pipeline by TMA, two
// consumer warpgroups multiply 64 x 128 tiles with wgmma, the result leaves by TMA.
#include "hopper.cuh"

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 4;

template <bool wait> __device__ void gemm(const CUtensorMap &A, const CUtensorMap &B, const CUtensorMap &C, int K) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __nv_bfloat16 *sA = (__nv_bfloat16 *)memory, *sB = sA + STAGES * BM * BK, *sC = sA;
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  int group = threadIdx.x >> 7, t = threadIdx.x & 127, steps = K / BK;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(shared_address(full + i), 1), barrier_init(shared_address(empty + i), 2);
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&A));
  }
  __syncthreads();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (t == 0)
      for (int k = 0; k < steps; k++) {
        int s = k % STAGES, phase = k / STAGES & 1;
        barrier_wait(shared_address(empty + s), phase ^ 1);
        barrier_expect(shared_address(full + s), (BM + BN) * BK * 2);
        load_tile(shared_address(sA + s * BM * BK), &A, shared_address(full + s), k * BK, blockIdx.y * BM);
        load_tile(shared_address(sB + s * BN * BK), &B, shared_address(full + s), k * BK, blockIdx.x * BN);
      }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int w = group - 1;
  float d[64] = {};
  for (int k = 0; k < steps; k++) {
    int s = k % STAGES, phase = k / STAGES & 1;
    if (wait) barrier_wait(shared_address(full + s), phase);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
      wgmma(d, descriptor(shared_address(sA + s * BM * BK + w * 64 * BK)) + kk * 2,
            descriptor(shared_address(sB + s * BN * BK)) + kk * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (t == 0) barrier_arrive(shared_address(empty + s));
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  int warp = t >> 5, lane = t & 31;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    uint32_t r[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      __nv_bfloat162 v = __floats2bfloat162_rn(d[j * 8 + e * 2], d[j * 8 + e * 2 + 1]);
      r[e] = *(uint32_t *)&v;
    }
    uint32_t a = shared_address(sC + (w * 64 + warp * 16 + (lane & 15)) * BN + j * 16 + (lane >> 4) * 8);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3]));
  }
  asm volatile("fence.proxy.async.shared::cta;");
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 128) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&C),
                 "r"(shared_address(sC)), "r"(blockIdx.x * BN), "r"(blockIdx.y * BM)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;");
  }
}

extern "C" __global__ void __launch_bounds__(384)
    gemm_hopper(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B,
                const __grid_constant__ CUtensorMap C, int K) {
  gemm<true>(A, B, C, K);
}

extern "C" __global__ void __launch_bounds__(384)
    missing_barrier_wait(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B,
                         const __grid_constant__ CUtensorMap C, int K) {
  gemm<false>(A, B, C, K);
}
