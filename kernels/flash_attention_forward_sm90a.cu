// The forward pass of flash_attention_forward.cu for Hopper, with the same results to save, for
// heads of exactly 64 or 128 values.
//
// Method: a thread block owns 128 queries of a head. A warpgroup's thread brings tiles of keys and
// values into a ring in shared memory by TMA; two warpgroups own 64 queries each, whose scores
// and weighted sums are products of a warpgroup (wgmma), the weights as the left operand from
// registers. While one warpgroup is at its softmax, the tensor cores work for the other, as in
// FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).
// Least work and traffic: as there.

#include "common/attention.cuh"
#include "common/online_softmax.cuh"
#include "common/tensor_copy.cuh"
#include "common/wgmma.cuh"

namespace {

// Warpgroups that multiply, before the one that copies.
constexpr unsigned kWorkers = 2;
constexpr unsigned kThreads = (kWorkers + 1) * kWarpgroup;

template <int D>
struct Forward {
  static constexpr unsigned kKeys = 128;
  static constexpr int kStages = D == 64 ? 4 : 2;
  // Blocks of 64 x 64 across a head, and down a tile of queries or keys.
  static constexpr unsigned kAcross = D / kBlock, kDown = kKeys / kBlock;
  static_assert(kRows == kWorkers * kBlock && kKeys == kRows, "tiles of one size");
  static constexpr unsigned kTile = kRows * D * 2;
  // Queries, the ring of keys and values, document starts and a word for each warp, barriers.
  static constexpr unsigned kStarts = (1 + 2 * kStages) * kTile;
  static constexpr unsigned kBarriers = kStarts + (kRows + kThreads / 32 + 4) * 4;

  uint32_t tile_q, ready, full, empty;

  __device__ __forceinline__ uint32_t tile_k(unsigned stage) const {
    return tile_q + (1 + 2 * stage) * kTile;
  }

  // One thread's work: the queries, then stage after stage of keys and values. Rows beyond the
  // sequence become zero. Blocks of keys lie column by column, others row by row.
  __device__ __forceinline__ void produce(const TensorMap& q, const TensorMap& k,
                                          const TensorMap& v, const Owner& owner,
                                          unsigned kv_head, unsigned key, unsigned end) const {
    barrier_expect(ready, kTile);
    for (unsigned b = 0; b < kDown * kAcross; ++b) {
      copy_block(tile_q + b * kBlockBytes, q, ready, owner.seq, owner.first + b / kAcross * kBlock,
                 owner.head * D + b % kAcross * kBlock);
    }
    for (Turn<kStages> turn; key < end; key += kKeys, turn.next()) {
      const uint32_t to = tile_k(turn.stage), here = full + turn.stage * 8;
      barrier_wait(empty + turn.stage * 8, turn.parity ^ 1);
      barrier_expect(here, 2 * kTile);
      for (unsigned b = 0; b < kDown * kAcross; ++b) {
        copy_block(to + b * kBlockBytes, k, here, owner.seq, key + b % kDown * kBlock,
                   kv_head * D + b / kDown * kBlock);
        copy_block(to + kTile + b * kBlockBytes, v, here, owner.seq, key + b / kAcross * kBlock,
                   kv_head * D + b % kAcross * kBlock);
      }
    }
  }

  // scores = Q K^T for a warpgroup's queries and the first 8 N keys of a tile.
  template <int N>
  __device__ __forceinline__ void score(float (&scores)[N][4], unsigned group,
                                        uint32_t keys) const {
    const uint64_t left =
        operand_descriptor<true>(tile_q + group * kAcross * kBlockBytes);
    const uint64_t right = operand_descriptor<true>(keys);
    hold(scores);
    wgmma_fence();
    wgmma_bf16<true, true, false>(scores, left, right);
#pragma unroll
    for (unsigned i = 1; i < D / 16; ++i) {
      const unsigned block = i / 4, step = i % 4 * kNextK<true>;
      wgmma_bf16<true, true>(scores, left + block * (kBlockBytes / 16) + step,
                             right + block * kDown * (kBlockBytes / 16) + step);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(scores);
  }

  // out += P V, P rounded to bf16.
  template <int N>
  static __device__ __forceinline__ void add_values(float (&out)[D / 8][4],
                                                    const float (&p)[N][4], uint32_t values) {
    uint32_t left[N / 2][4];
    pack(left, p);
    const uint64_t right = operand_descriptor<false>(values);
    hold(out);
    wgmma_fence();
#pragma unroll
    for (unsigned i = 0; i < N / 2; ++i) {
      wgmma_bf16<false>(out, left[i], right + i / 4 * kAcross * (kBlockBytes / 16) +
                                          i % 4 * kNextK<false>);
    }
    wgmma_commit();
    wgmma_wait<0>();
    hold(out);
  }
};

template <int D>
__device__ __forceinline__ void forward(__nv_bfloat16* o, float* log_sum, const TensorMap& q,
                                        const TensorMap& k, const TensorMap& v,
                                        const unsigned* doc_starts, const Shape& s) {
  using F = Forward<D>;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t barriers = shared_address(shared + F::kBarriers);
  const F f{shared_address(shared), barriers, barriers + 8, barriers + 8 + 8 * F::kStages};
  if (threadIdx.x == 0) {
    barrier_init(f.ready, 1);
    for (unsigned i = 0; i < F::kStages; ++i) {
      barrier_init(f.full + i * 8, 1);
      barrier_init(f.empty + i * 8, kWorkers * kWarpgroup / 32);
    }
    barrier_init_done();
  }
  const Owner owner(s, s.heads, true, blockIdx.x, gridDim.x);
  const unsigned* starts = starts_of(doc_starts, s, owner.seq);
  auto* here = starts ? reinterpret_cast<unsigned*>(shared + F::kStarts) : nullptr;
  unsigned key = first_visible<kThreads>(here, starts, owner.first, s.seq_len);
  key = key / F::kKeys * F::kKeys;
  const unsigned end = min(owner.first + kRows, s.seq_len);
  __syncthreads();
  const unsigned group = uniform(threadIdx.x / kWarpgroup);
  // 168 registers a thread at the launch, and as many in all after this.
  if (group == kWorkers) {
    release_registers<40>();
    if (threadIdx.x == kWorkers * kWarpgroup) {
      f.produce(q, k, v, owner, owner.head / (s.heads / s.kv_heads), key, end);
    }
    return;
  }
  claim_registers<232>();
  const unsigned row = threadIdx.x / 32 * 16, query = owner.first + row;
  Softmax<1> softmax;
  float out[1][D / 8][4] = {};
  float p[1][F::kKeys / 8][4] = {};
  barrier_wait(f.ready, 0);
  for (Turn<F::kStages> turn; key < end; key += F::kKeys, turn.next()) {
    const uint32_t tile_k = f.tile_k(turn.stage);
    barrier_wait(f.full + turn.stage * 8, turn.parity);
    const auto attend = [&](auto& scores, unsigned count) {
      f.score(scores[0], group, tile_k);
      if (here || key + count > query + 1) mask(scores, query, key, here ? here + row : nullptr);
      softmax.step(scores, out, s.scale);
      F::add_values(out[0], scores[0], tile_k + F::kTile);
    };
    if (group == 0 && key == owner.first) {
      // The other half of the keys is above the diagonal.
      float half[1][kBlock / 8][4] = {};
      attend(half, kBlock);
    } else {
      attend(p, F::kKeys);
    }
    if (threadIdx.x % 32 == 0) barrier_arrive(f.empty + turn.stage * 8, 0);
  }
  log_sum += statistics_at(s, owner.seq, owner.head);
  softmax.finish(out, s.scale, log_sum, query, s.seq_len);
  // The result passes through the queries' memory, which other warps of the warpgroup may read.
  warpgroup_sync(group);
  store_rows<D>(rows_of(o, s, owner.seq, owner.head, s.heads), owner.first, out, shared, row);
}

}  // namespace

// One block for each 128 queries of each query head and sequence. q, k, v: maps of [batch, seq_len,
// heads d] for blocks of 64 x 64; seq_len >= 1, start_i <= i, scale = log2(e) / sqrt(d).
extern "C" __global__ void __launch_bounds__(kThreads, 1) flash_attention_forward_wgmma_bf16_d64(
    __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const unsigned* __restrict__ doc_starts,
    unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  forward<64>(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) flash_attention_forward_wgmma_bf16_d128(
    __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
    const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const unsigned* __restrict__ doc_starts,
    unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  forward<128>(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
}
