// Copies of blocks of a matrix by tensor map (TMA) into the shared memory of a cluster's thread
// blocks, and the barriers that they report to (mbarrier). sm_90 on. Barriers are given by their
// address in shared memory.
#pragma once

#include <cstdint>

// What cuTensorMapEncodeTiled makes; a kernel takes it as a __grid_constant__ parameter.
struct alignas(128) TensorMap {
  unsigned char opaque[128];
};

// The place of this thread block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Waits for all threads of the cluster, and makes what they wrote before visible.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// A barrier whose phases end after `arrivals` arrivals and all bytes expected.
__device__ __forceinline__ void barrier_init(uint32_t barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the cluster and to copies; cluster_sync must follow.
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase wait for `bytes` more.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at a barrier of this block.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier that block `rank` of the cluster has at the same address. Orders what this
// thread has read alone: a release for the cluster would wait for all its writes, at every stage.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, unsigned rank) {
  asm volatile(
      "{\n\t"
      ".reg .b32 there;\n\t"
      "mapa.shared::cluster.u32 there, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// Waits for the end of the phase of this parity; the phase before the first has parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, unsigned parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n\t"
        ".reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.b32 %0, 1, 0, p;\n\t"
        "}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Starts copying `bytes` that lie together; both addresses and `bytes` must be multiples of 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t barrier,
                                           unsigned bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

// Starts copying the map's block that begins at (row, col). What lies outside the matrix becomes
// zero and counts as copied.
__device__ __forceinline__ void copy_block(uint32_t to, const TensorMap& from, uint32_t barrier,
                                           unsigned row, unsigned col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

// The same from a map of several matrices, one after the other.
__device__ __forceinline__ void copy_block(uint32_t to, const TensorMap& from, uint32_t barrier,
                                           unsigned matrix, unsigned row, unsigned col) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(col), "r"(row), "r"(matrix)
      : "memory");
}

// As the first into all blocks of the cluster in `blocks` (a bit each), at the same addresses.
__device__ __forceinline__ void copy_block_to(uint16_t blocks, uint32_t to, const TensorMap& from,
                                              uint32_t barrier, unsigned row, unsigned col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(&from), "r"(barrier), "r"(col), "r"(row), "h"(blocks)
      : "memory");
}

// A place in a ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Turn {
  unsigned stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};
