// Matrix products on Hopper, tile after tile, up to what becomes of a tile.
//
// Method: a warpgroup's thread fills a ring of stages in shared memory by TMA, two warpgroups
// multiply 64 rows each with wgmma, as in CUTLASS's warp-specialised persistent kernels. The two
// thread blocks of a cluster compute tiles one below the other: each loads its own rows of L and
// every other block of their columns of R, which it multicasts to both. A block goes from tile to
// tile, so that the ring fills for the next while a result is written. K is summed in one order for
// all tiles and grids, so that the result has the same bits in every run.
#pragma once

#include "async_copy.cuh"
#include "gemm_args.cuh"
#include "gemm_tile.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

// Thread blocks of a cluster.
constexpr unsigned kPair = 2;
// Warpgroups that multiply, before the one that copies.
constexpr unsigned kWorkers = 2;
static_assert(kStageK == kBlock, "a stage is one block of operands deep");

// Threads of a block.
constexpr unsigned kThreads = (kWorkers + 1) * kWarpgroup;

struct Maps {
  const TensorMap &lhs, &rhs;
};

// A tile's first row and column, and its slice of K: where it begins and how long it is.
struct Place {
  unsigned row, col, slice, k, k_len;
};

// A warp's part of a tile.
template <class T>
using Sums = float[1][T::kFragmentsN][4];

// The stages of a block in shared memory.
template <class T>
struct Ring {
  static constexpr unsigned kLhsBytes = T::kM / kBlock * kBlockBytes;
  static constexpr unsigned kRhsBytes = T::kN / kBlock * kBlockBytes;
  static constexpr unsigned kStageBytes = kLhsBytes + kRhsBytes;
  static constexpr unsigned kBytes = T::kStages * kStageBytes;
  static_assert(T::kWarpM == kMmaM && T::kM == kWorkers * kBlock, "64 rows for each warpgroup");
};

// Args: m, n, k, and those of the low-rank product and of slices, low_k and splits.
template <class T, Layout kLayout, class Args>
struct Hopper {
  static constexpr bool kLhsAlongK = kLayout != Layout::kTn, kRhsAlongK = kLayout == Layout::kNt;
  static constexpr unsigned kLhsBytes = Ring<T>::kLhsBytes;
  static constexpr unsigned kStageBytes = Ring<T>::kStageBytes;

  const Args& g;
  // The ring, and each stage's two barriers: its operands are there; all warps of both thread
  // blocks have read it.
  uint32_t ring, full, empty;
  // This thread's warpgroup.
  unsigned group;

  __device__ __forceinline__ unsigned low_stages() const {
    return (g.low_k + kStageK - 1) / kStageK;
  }

  // Stages of a slice, those of the low-rank product among them.
  __device__ __forceinline__ unsigned stages(const Place& at) const {
    return low_stages() + (at.k_len + kStageK - 1) / kStageK;
  }

  // Calls f with this block's part of each of its cluster's tiles.
  template <class F>
  __device__ __forceinline__ void each_tile(F f) const {
    const unsigned pairs = (g.m + kPair * T::kM - 1) / (kPair * T::kM);
    const unsigned cols = (g.n + T::kN - 1) / T::kN;
    const unsigned all_stages = (g.k + kStageK - 1) / kStageK;
    const unsigned slice_k = (all_stages + g.splits - 1) / g.splits * kStageK;
    const unsigned step = gridDim.x / kPair;
    for (unsigned tile = blockIdx.x / kPair; tile < pairs * cols * g.splits; tile += step) {
      const unsigned slice = tile / (pairs * cols), k = slice * slice_k;
      const TilePlace at = place_tile(tile % (pairs * cols), pairs, cols, kBand / kPair);
      f(Place{(at.row * kPair + cluster_rank()) * T::kM, at.col * T::kN, slice, k,
              min(slice_k, g.k - k)});
    }
  }

  // One thread's work: fills stage after stage.
  __device__ __forceinline__ void produce(const Maps& low, const Maps& whole) const {
    Turn<T::kStages> turn;
    each_tile([&](const Place& at) {
      for (unsigned i = 0; i < stages(at); ++i, turn.next()) {
        const uint32_t stage = ring + turn.stage * kStageBytes;
        const uint32_t ready = full + turn.stage * 8;
        const bool is_low = i < low_stages();
        const unsigned k = is_low ? i * kStageK : at.k + (i - low_stages()) * kStageK;
        const TensorMap& lhs = is_low ? low.lhs : whole.lhs;
        const TensorMap& rhs = is_low ? low.rhs : whole.rhs;
        barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
        barrier_expect(ready, kStageBytes);
#pragma unroll
        for (unsigned b = 0; b < T::kM / kBlock; ++b) {
          const unsigned row = at.row + b * kBlock;
          copy_block(stage + b * kBlockBytes, lhs, ready, kLhsAlongK ? row : k,
                     kLhsAlongK ? k : row);
        }
        // Which block is whose changes with the stage, since there may be an odd number.
        for (unsigned b = (cluster_rank() + i) % kPair; b < T::kN / kBlock; b += kPair) {
          const unsigned col = at.col + b * kBlock;
          copy_block_to((1 << kPair) - 1, stage + kLhsBytes + b * kBlockBytes, rhs, ready,
                        kRhsAlongK ? col : k, kRhsAlongK ? k : col);
        }
      }
    });
  }

  // Tells both producers that this warp has read a stage.
  __device__ __forceinline__ void release(unsigned stage) const {
    const unsigned lane = threadIdx.x % 32;
    if (lane < kPair) barrier_arrive(empty + stage * 8, lane);
  }

  // The descriptors of this warpgroup's operands in a stage.
  struct Operands {
    uint64_t lhs, rhs;
  };

  __device__ __forceinline__ Operands operands(unsigned stage) const {
    const uint32_t at = ring + stage * kStageBytes;
    return {operand_descriptor<kLhsAlongK>(at + group * kBlockBytes),
            operand_descriptor<kRhsAlongK>(at + kLhsBytes)};
  }

  // acc += the products over the 16 values of K from `step` kMmaK on.
  static __device__ __forceinline__ void multiply(float (&acc)[T::kFragmentsN][4],
                                                  const Operands& from, unsigned step) {
    wgmma_bf16<kLhsAlongK, kRhsAlongK>(acc, from.lhs + step * kNextK<kLhsAlongK>,
                                       from.rhs + step * kNextK<kRhsAlongK>);
  }

  // acc += the product over the next stages, k values of K. A stage is given back while the next
  // one multiplies.
  __device__ __forceinline__ void consume(float (&acc)[T::kFragmentsN][4],
                                          Turn<T::kStages>& turn, unsigned k) const {
    hold(acc);
    unsigned last = 0;
    for (unsigned i = 0; i < k / kStageK; ++i, turn.next()) {
      barrier_wait(full + turn.stage * 8, turn.parity);
      const Operands from = operands(turn.stage);
      wgmma_fence();
#pragma unroll
      for (unsigned step = 0; step < kStageK / kMmaK; ++step) multiply(acc, from, step);
      wgmma_commit();
      wgmma_wait<1>();
      if (i > 0) release(last);
      last = turn.stage;
    }
    wgmma_wait<0>();
    hold(acc);
    if (k >= kStageK) release(last);
    const unsigned rest = k % kStageK;
    if (rest == 0) return;
    barrier_wait(full + turn.stage * 8, turn.parity);
    const Operands from = operands(turn.stage);
#pragma unroll 1
    for (unsigned step = 0; step * kMmaK < rest; ++step) {
      wgmma_fence();
      multiply(acc, from, step);
      wgmma_commit();
      wgmma_wait<0>();
      hold(acc);
    }
    release(turn.stage);
    turn.next();
  }

  // A warpgroup's work: multiplies tile after tile and hands on what has become of them.
  template <class Between, class Write>
  __device__ __forceinline__ void work(Between between, Write write) const {
    Turn<T::kStages> turn;
    each_tile([&](const Place& at) {
      if (at.row + group * kBlock >= g.m) {
        // Rows below the result: the other warpgroups still wait for these stages.
        for (unsigned i = 0; i < stages(at); ++i, turn.next()) {
          barrier_wait(full + turn.stage * 8, turn.parity);
          release(turn.stage);
        }
        return;
      }
      Sums<T> acc = {};
      consume(acc[0], turn, g.low_k);
      between(acc, at);
      consume(acc[0], turn, at.k_len);
      write(acc, at);
    });
  }
};

// Computes all tiles, those of `whole` on top of those of `low`: `between(acc, place)` is called
// for each after the low-rank product, `write(acc, place)` when all is there. Shared memory holds
// the ring, kBeside bytes of the caller's, and two barriers of 8 bytes for each stage.
template <class T, Layout kLayout, unsigned kBeside, class Args, class Between, class Write>
__device__ __forceinline__ void compute_tiles(const Args& g, const Maps& low, const Maps& whole,
                                              unsigned char* shared, Between between,
                                              Write write) {
  const uint32_t ring = shared_address(shared);
  const uint32_t full = ring + Ring<T>::kBytes + kBeside, empty = full + 8 * T::kStages;
  if (threadIdx.x == 0) {
    for (unsigned i = 0; i < T::kStages; ++i) {
      barrier_init(full + i * 8, 1);
      barrier_init(empty + i * 8, kPair * T::kWarps);
    }
    barrier_init_done();
  }
  cluster_sync();
  const unsigned group = uniform(threadIdx.x / kWarpgroup);
  const Hopper<T, kLayout, Args> h{g, ring, full, empty, group};
  // 168 registers a thread at the launch, and as many in all after this.
  if (group == kWorkers) {
    release_registers<40>();
    if (threadIdx.x == T::kThreads) h.produce(low, whole);
  } else {
    claim_registers<232>();
    h.work(between, write);
  }
  // No block may end while the other one copies to its memory or arrives at its barriers.
  cluster_sync();
}
