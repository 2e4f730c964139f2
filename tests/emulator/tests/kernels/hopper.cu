// C = A B^T in bf16 for Hopper: a producer warpgroup fills a four-stage pipeline by TMA, two
// consumer warpgroups multiply 64 x 128 tiles with wgmma, the result leaves by TMA.
#include "hopper.cuh"

constexpr int BM = 128, BN = 128, BK = 64, STAGES = 4;

// What a variant leaves out or does too early.
enum Fault { NONE, NO_BARRIER_WAIT, NO_PRODUCT_WAIT, EARLY_RELEASE, NO_STORE_WAIT, NO_PROXY_FENCE };

template <Fault fault> __device__ void gemm(const CUtensorMap &A, const CUtensorMap &B, const CUtensorMap &C, int K) {
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
        load_tile(shared_address(sA + s * BM * BK), &A, shared_address(full + s), k * BK, blockIdx.y * BM); // FAULT missing_product_wait early_release
        load_tile(shared_address(sB + s * BN * BK), &B, shared_address(full + s), k * BK, blockIdx.x * BN); // FAULT missing_product_wait early_release
      }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  int w = group - 1;
  float d[64] = {};
  for (int k = 0; k < steps; k++) {
    int s = k % STAGES, phase = k / STAGES & 1;
    if (fault != NO_BARRIER_WAIT) barrier_wait(shared_address(full + s), phase);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
      wgmma(d, descriptor(shared_address(sA + s * BM * BK + w * 64 * BK)) + kk * 2, // FAULT missing_barrier_wait
            descriptor(shared_address(sB + s * BN * BK)) + kk * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (fault == EARLY_RELEASE) {
      asm volatile("bar.sync %0, 128;" ::"r"(2 + w) : "memory");
      if (t == 0) barrier_arrive(shared_address(empty + s));
    }
    if (fault != NO_PRODUCT_WAIT) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (fault != EARLY_RELEASE && t == 0) barrier_arrive(shared_address(empty + s));
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");
  int warp = t >> 5, lane = t & 31;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    uint32_t r[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      __nv_bfloat162 v = __floats2bfloat162_rn(d[j * 8 + e * 2], d[j * 8 + e * 2 + 1]); // FAULT missing_product_wait
      r[e] = *(uint32_t *)&v;
    }
    uint32_t a = shared_address(sC + (w * 64 + warp * 16 + (lane & 15)) * BN + j * 16 + (lane >> 4) * 8);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3]));
  }
  if (fault != NO_PROXY_FENCE) asm volatile("fence.proxy.async.shared::cta;");
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (threadIdx.x == 128) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&C),
                 "r"(shared_address(sC)), "r"(blockIdx.x * BN), "r"(blockIdx.y * BM) // FAULT missing_proxy_fence
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    if (fault != NO_STORE_WAIT) asm volatile("cp.async.bulk.wait_group.read 0;");
  }
}

#define GEMM(name, fault)                                                                          \
  extern "C" __global__ void __launch_bounds__(384)                                               \
      name(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B,          \
           const __grid_constant__ CUtensorMap C, int K) {                                        \
    gemm<fault>(A, B, C, K);                                                                      \
  }
GEMM(gemm_hopper, NONE)
GEMM(missing_barrier_wait, NO_BARRIER_WAIT)
GEMM(missing_product_wait, NO_PRODUCT_WAIT)
GEMM(early_release, EARLY_RELEASE)
GEMM(missing_store_wait, NO_STORE_WAIT) // FAULT missing_store_wait
GEMM(missing_proxy_fence, NO_PROXY_FENCE)

// Two tiles leave through one buffer: `wait` says whether the first has been read before the
// second is written, and `done` whether the first has arrived before it is read back.
template <bool wait, bool done> __device__ void store_twice(int *y, int *back) {
  __shared__ __align__(128) int tile[64];
  for (int round = 0; round < 2; round++) {
    tile[threadIdx.x] = round * 64 + threadIdx.x; // FAULT overwritten_source
    asm volatile("fence.proxy.async.shared::cta;");
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;" ::"l"(y + round * 64),
                   "r"(shared_address(tile))
                   : "memory");
      asm volatile("cp.async.bulk.commit_group;");
      if (wait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      if (done) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      if (round == 0) *back = *(volatile int *)(y + 1);
    }
    __syncthreads();
  }
}
extern "C" __global__ void store_and_wait(int *y, int *back) { store_twice<true, true>(y, back); }
extern "C" __global__ void store_and_read_back_early(int *y, int *back) { store_twice<true, false>(y, back); }
extern "C" __global__ void overwritten_source(int *y, int *back) { store_twice<false, false>(y, back); }

// Adds to global memory by bulk reductions, and to the shared memory of block 0 of the cluster.
extern "C" __global__ void __cluster_dims__(2, 1, 1) reduce(float *sums, uint32_t *largest) {
  __shared__ __align__(128) float values[64];
  __shared__ __align__(128) uint32_t mine[64], all[64];
  __shared__ __align__(8) uint64_t bar;
  uint32_t rank, to, remote_bar;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  values[threadIdx.x] = threadIdx.x + 0.5f * rank;
  mine[threadIdx.x] = rank ? 63 - threadIdx.x : threadIdx.x;
  all[threadIdx.x] = 32;
  if (threadIdx.x == 0) {
    barrier_init(shared_address(&bar), 1);
    barrier_expect(shared_address(&bar), rank == 0 ? 512 : 0);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  asm volatile("fence.proxy.async.shared::cta;");
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], 256;" ::"l"(sums),
                 "r"(shared_address(values))
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to) : "r"(shared_address(all)));
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote_bar) : "r"(shared_address(&bar)));
    asm volatile(
        "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.max.u32 [%0], [%1], 256, [%2];" ::"r"(to),
        "r"(shared_address(mine)), "r"(remote_bar)
        : "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  if (rank == 0) {
    barrier_wait(shared_address(&bar), 0);
    largest[threadIdx.x] = all[threadIdx.x];
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
