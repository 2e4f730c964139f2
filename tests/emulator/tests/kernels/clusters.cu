// Clusters: distributed shared memory, remote barriers, multicast; and what can go wrong with them.
#include "hopper.cuh"
#include <cooperative_groups.h>

namespace cg = cooperative_groups;

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t remote(uint32_t address, uint32_t rank) {
  uint32_t out;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ __forceinline__ void remote_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// What each thread sees of its place, 12 words a thread.
extern "C" __global__ void places(uint32_t *out) {
  uint32_t v[12];
  asm volatile("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(v[0]));
  asm volatile("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(v[1]));
  asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(v[2]));
  asm volatile("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(v[3]));
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(v[4]));
  asm volatile("mov.u32 %0, %%clusterid.y;" : "=r"(v[5]));
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(v[6]));
  asm volatile("mov.u32 %0, %%nclusterid.y;" : "=r"(v[7]));
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(v[8]));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(v[9]));
  v[10] = cg::this_cluster().block_rank();
  v[11] = cg::this_cluster().num_threads();
  uint32_t block = blockIdx.x + gridDim.x * blockIdx.y;
  for (int i = 0; i < 12; i++) out[(block * blockDim.x + threadIdx.x) * 12 + i] = v[i];
}

// Each block publishes a row; each reads all rows of its cluster through generic pointers.
extern "C" __global__ void __cluster_dims__(4, 1, 1) exchange(const float *x, float *sums) {
  __shared__ float row[64];
  cg::cluster_group cluster = cg::this_cluster();
  row[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  cluster.sync();
  float sum = 0;
  for (unsigned r = 0; r < cluster.num_blocks(); r++) {
    float *other = cluster.map_shared_rank(row, r);
    if (cluster.query_shared_rank(other) != r) __trap();
    sum += (r + 1) * other[threadIdx.x];
  }
  sums[blockIdx.x * 64 + threadIdx.x] = sum;
  cluster.sync();
}

// A histogram whose bins are spread over the blocks of the cluster, after CUDA's programming guide.
extern "C" __global__ void histogram(const int *values, int n, int *bins_out) {
  __shared__ int bins[32];
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x < 32) bins[threadIdx.x] = 0;
  cluster.sync();
  for (int i = cluster.thread_rank(); i < n; i += cluster.num_threads()) {
    int bin = values[i];
    atomicAdd(cluster.map_shared_rank(bins, bin / 32) + bin % 32, 1);
  }
  cluster.sync();
  if (threadIdx.x < 32) bins_out[cluster.block_rank() * 32 + threadIdx.x] = bins[threadIdx.x];
}

// Each block writes a row of global memory; behind the cluster's barrier its neighbour reads it.
extern "C" __global__ void __cluster_dims__(2, 1, 1) exchange_through_global_memory(int *x, int *y) {
  int i = blockIdx.x * 32 + threadIdx.x;
  x[i] = i;
  cluster_sync();
  y[i] = x[i ^ 32];
}

// Each block sends its tile to the next one by a bulk copy, which reports to that block's barrier.
extern "C" __global__ void ring(const int *x, int *y) {
  __shared__ __align__(128) int mine[64], received[64];
  __shared__ __align__(8) uint64_t ready;
  uint32_t rank = cluster_rank(), next = (rank + 1) % cg::this_cluster().num_blocks();
  uint32_t barrier = shared_address(&ready);
  mine[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x];
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, sizeof(mine));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  asm volatile("fence.proxy.async.shared::cta;");
  cluster_sync();
  if (threadIdx.x == 0)
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     remote(shared_address(received), next)),
                 "r"(shared_address(mine)), "r"((uint32_t)sizeof(mine)), "r"(remote(barrier, next))
                 : "memory");
  barrier_wait(barrier, 0);
  y[blockIdx.x * 64 + threadIdx.x] = received[threadIdx.x];
  cluster_sync();
}

// Each thread sends a pair to the next block by an asynchronous store.
extern "C" __global__ void send_pairs(const int *x, int *y) {
  __shared__ __align__(16) int received[128];
  __shared__ __align__(8) uint64_t ready;
  uint32_t next = (cluster_rank() + 1) % cg::this_cluster().num_blocks(), barrier = shared_address(&ready);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_expect(barrier, sizeof(received));
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  cluster_sync();
  int i = blockIdx.x * 128 + 2 * threadIdx.x;
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote(shared_address(received + 2 * threadIdx.x), next)),
               "r"(x[i]), "r"(x[i + 1]), "r"(remote(barrier, next))
               : "memory");
  barrier_wait(barrier, 0);
  y[i] = received[2 * threadIdx.x];
  y[i + 1] = received[2 * threadIdx.x + 1];
  cluster_sync();
}

// C = A B^T in bf16: the two blocks of a cluster have the same rows of A; each loads half of
// them and multicasts it to both, and its own columns of B.
constexpr int BM = 128, BN = 128, BK = 64, STAGES = 3;

template <bool tail, bool both> __device__ void gemm(const CUtensorMap &A, const CUtensorMap &B, __nv_bfloat16 *C, int N, int K) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __nv_bfloat16 *sA = (__nv_bfloat16 *)memory, *sB = sA + STAGES * BM * BK;
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  int group = threadIdx.x >> 7, t = threadIdx.x & 127, steps = K / BK;
  uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    // A stage is free when the two consumer groups of both blocks have read it.
    for (int i = 0; i < STAGES; i++)
      barrier_init(shared_address(full + i), 1), barrier_init(shared_address(empty + i), both ? 4 : 2);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  cluster_sync();
  if (group == 0) {
    if (t == 0) {
      for (int k = 0; k < steps; k++) {
        int s = k % STAGES, phase = k / STAGES & 1;
        uint32_t barrier = shared_address(full + s);
        barrier_wait(shared_address(empty + s), phase ^ 1);
        barrier_expect(barrier, (BM + BN) * BK * 2);
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
            "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(sA + s * BM * BK + rank * 64 * BK)),
            "l"(&A), "r"(barrier), "r"(k * BK), "r"(blockIdx.y * BM + rank * 64), "h"((uint16_t)3)
            : "memory");
        load_tile(shared_address(sB + s * BN * BK), &B, barrier, k * BK, blockIdx.x * BN);
      }
      // The other block arrives at these barriers until it has read all stages.
      if (tail)
        for (int k = steps; k < steps + STAGES; k++)
          barrier_wait(shared_address(empty + k % STAGES), (k / STAGES & 1) ^ 1);
    }
    return;
  }
  int w = group - 1;
  float d[64] = {};
  for (int k = 0; k < steps; k++) {
    int s = k % STAGES, phase = k / STAGES & 1;
    barrier_wait(shared_address(full + s), phase);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int kk = 0; kk < 4; kk++)
      wgmma(d, descriptor(shared_address(sA + s * BM * BK + w * 64 * BK)) + kk * 2,
            descriptor(shared_address(sB + s * BN * BK)) + kk * 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (t < (both ? 2 : 1)) remote_arrive(remote(shared_address(empty + s), both ? t : rank));
  }
  int warp = t >> 5, lane = t & 31;
  for (int i = 0; i < 64; i += 2) {
    int row = blockIdx.y * BM + w * 64 + warp * 16 + lane / 4 + 8 * (i / 2 % 2);
    int column = blockIdx.x * BN + i / 4 * 8 + 2 * (lane % 4);
    *(__nv_bfloat162 *)(C + row * N + column) = __floats2bfloat162_rn(d[i], d[i + 1]);
  }
}

#define GEMM(name, tail, both)                                                                            \
  extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384)                             \
      name(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B, __nv_bfloat16 *C, \
           int N, int K) {                                                                                \
    gemm<tail, both>(A, B, C, N, K);                                                                      \
  }
GEMM(gemm_multicast, true, true)
GEMM(gemm_without_tail, false, true)
GEMM(gemm_with_own_readers_only, true, false)

// ---- planted faults

extern "C" __global__ void __cluster_dims__(2, 1, 1) missing_cluster_barrier(int *y) {
  __shared__ int x[32];
  x[threadIdx.x] = blockIdx.x;
  if (blockIdx.x == 0) __nanosleep(1);
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = *cg::this_cluster().map_shared_rank(x + threadIdx.x, cluster_rank() ^ 1); // FAULT missing_cluster_barrier
  cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) relaxed_arrival(int *y) {
  __shared__ int x[32];
  x[threadIdx.x] = blockIdx.x;
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  y[blockIdx.x * 32 + threadIdx.x] = *cg::this_cluster().map_shared_rank(x + threadIdx.x, cluster_rank() ^ 1); // FAULT relaxed_arrival
  cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) missing_barrier_before_exit(int *y) {
  __shared__ int x[32];
  x[threadIdx.x] = blockIdx.x;
  cluster_sync();
  y[blockIdx.x * 32 + threadIdx.x] = *cg::this_cluster().map_shared_rank(x + threadIdx.x, cluster_rank() ^ 1);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) remote_off_by_one(int n) {
  __shared__ int x[32];
  cluster_sync();
  for (int i = threadIdx.x; i <= n; i += 32)
    cg::this_cluster().map_shared_rank(x, cluster_rank() ^ 1)[i] = i; // FAULT remote_off_by_one
  cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) rank_outside_the_cluster(int *y) {
  __shared__ int x[32];
  x[threadIdx.x] = 1;
  cluster_sync();
  y[threadIdx.x] = remote(shared_address(x + threadIdx.x), 2); // FAULT rank_outside
  cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) one_block_arrives() {
  if (blockIdx.x == 1) asm volatile("bar.sync 1, 64;"); // half the threads it waits for exist
  cluster_sync(); // FAULT one_block_arrives
}

// The neighbour is one of another cluster, for which the barrier does not hold.
extern "C" __global__ void __cluster_dims__(2, 1, 1) exchange_between_clusters(int *x, int *y) {
  int i = blockIdx.x * 32 + threadIdx.x;
  x[i] = i;
  cluster_sync();
  y[i] = x[i ^ 64];
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) wait_without_arrival() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); // FAULT wait_without_arrival
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) arrive_before_initialization() {
  __shared__ __align__(8) uint64_t bar;
  uint32_t barrier = shared_address(&bar);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (threadIdx.x == 0 && cluster_rank() == 1) remote_arrive(remote(barrier, 0)); // FAULT arrive_before_initialization
  if (cluster_rank() == 0) barrier_wait(barrier, 0);
  cluster_sync();
}
