// C = A B^T in bf16 for Hopper: a producer warpgroup fills a four-stage pipeline by TMA, two
// consumer warpgroups multiply 64 x 128 tiles with wgmma, the result leaves by TMA.
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 4;

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT_%=:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE_%=;\nbra WAIT_%=;\nDONE_%=:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// Descriptor of a K-major operand in rows of 128 bytes with the 128-byte swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  return (uint64_t)((address & 0x3ffff) >> 4) | 1ull << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define ACC(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ __forceinline__ void wgmma(float *d, uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,"
      "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,"
      "%58,%59,%60,%61,%62,%63}, %64, %65, 1, 1, 1, 0, 0;"
      : ACC(0), ACC(4), ACC(8), ACC(12), ACC(16), ACC(20), ACC(24), ACC(28), ACC(32), ACC(36), ACC(40), ACC(44),
        ACC(48), ACC(52), ACC(56), ACC(60)
      : "l"(a), "l"(b));
}

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
