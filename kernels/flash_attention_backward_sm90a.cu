// The two passes of flash_attention_backward.cu for Hopper, between its other kernels, for heads of
// exactly 64 or 128 values.
//
// Method: a thread block owns 128 queries or keys. A warpgroup's thread brings tiles of the other
// side into a ring in shared memory by TMA; two warpgroups own 64 rows each. Scores and gradients
// of weights are products of a warpgroup (wgmma) from shared memory, with owned rows on the left;
// weights and gradients of scores are left operands from registers for the sums. A warpgroup's
// products run while it computes weights, and while it waits the tensor cores work for the other,
// as in FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608).
// Least work and traffic: as there.

#include "common/attention_backward.cuh"
#include "common/tensor_copy.cuh"
#include "common/wgmma.cuh"

namespace {

// Warpgroups that multiply, before the one that copies.
constexpr unsigned kWorkers = 2;
constexpr unsigned kThreads = (kWorkers + 1) * kWarpgroup;

// Two tiles that stay, a ring of pairs of tiles that come and go, the statistics of the ring's
// queries, document starts and a word for each warp, barriers. Blocks of 64 x 64 lie row by row in
// tiles that stay, else column by column.
template <int D>
struct Layout {
  static constexpr unsigned kAcross = D / kBlock;
  static constexpr unsigned kOwned = kRows * D * 2, kRing = 128 << 10;
  static constexpr unsigned kSpans = 2 * kOwned + kRing;
  static constexpr unsigned kMostStages = kRing / (2 * kSpan * D * 2);
  static constexpr unsigned kSpanBytes = 3 * kSpan * 4;
  static constexpr unsigned kStarts = kSpans + kMostStages * kSpanBytes;
  static constexpr unsigned kBarriers = kStarts + (kRows + kThreads / 32 + 4) * 4;
};

// The ring with kStreamed rows in each tile.
template <int D, unsigned kStreamed>
struct Ring : Layout<D> {
  using L = Layout<D>;
  static constexpr unsigned kDown = kStreamed / kBlock, kTile = kStreamed * D * 2;
  static constexpr int kStages = L::kRing / (2 * kTile);

  uint32_t shared;

  __device__ __forceinline__ uint32_t ready() const { return shared + L::kBarriers; }
  __device__ __forceinline__ uint32_t full(unsigned stage) const { return ready() + 8 + stage * 8; }
  __device__ __forceinline__ uint32_t empty(unsigned stage) const { return full(kStages + stage); }
  __device__ __forceinline__ uint32_t tile(unsigned stage) const {
    return shared + 2 * L::kOwned + stage * 2 * kTile;
  }

  __device__ __forceinline__ void init() const {
    if (threadIdx.x > 0) return;
    barrier_init(ready(), 1);
    for (unsigned i = 0; i < kStages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), kWorkers * kWarpgroup / 32);
    }
    barrier_init_done();
  }

  // One thread's work, as what follows: the tiles that stay.
  __device__ __forceinline__ void bring_owned(const TensorMap& a, const TensorMap& b, unsigned seq,
                                              unsigned row, unsigned head) const {
    barrier_expect(ready(), 2 * L::kOwned);
    for (unsigned i = 0; i < 2 * L::kAcross; ++i) {
      const unsigned r = row + i / L::kAcross * kBlock, c = head * D + i % L::kAcross * kBlock;
      copy_block(shared + i * kBlockBytes, a, ready(), seq, r, c);
      copy_block(shared + L::kOwned + i * kBlockBytes, b, ready(), seq, r, c);
    }
  }

  // A pair of tiles, with `more` bytes that the caller copies. Rows beyond the sequence become
  // zero.
  __device__ __forceinline__ void bring(const Turn<kStages>& turn, const TensorMap& a,
                                        const TensorMap& b, unsigned seq, unsigned row,
                                        unsigned head, unsigned more) const {
    const uint32_t to = tile(turn.stage), here = full(turn.stage);
    barrier_wait(empty(turn.stage), turn.parity ^ 1);
    barrier_expect(here, 2 * kTile + more);
    for (unsigned i = 0; i < kDown * L::kAcross; ++i) {
      const unsigned r = row + i % kDown * kBlock, c = head * D + i / kDown * kBlock;
      copy_block(to + i * kBlockBytes, a, here, seq, r, c);
      copy_block(to + kTile + i * kBlockBytes, b, here, seq, r, c);
    }
  }

  // Starts c = A B^T: A is 64 rows of a tile that stays, B the first 8 N rows of one of the ring.
  template <int N>
  static __device__ __forceinline__ void multiply_rows(float (&c)[N][4], uint32_t a, uint32_t b) {
    const uint64_t left = operand_descriptor<true>(a), right = operand_descriptor<true>(b);
    wgmma_bf16<true, true, false>(c, left, right);
#pragma unroll
    for (unsigned i = 1; i < D / 16; ++i) {
      const unsigned block = i / 4, step = i % 4 * kNextK<true>;
      wgmma_bf16<true, true>(c, left + block * (kBlockBytes / 16) + step,
                             right + block * kDown * (kBlockBytes / 16) + step);
    }
    wgmma_commit();
  }

  // Starts c += P B: B is the first 16 N rows of a tile of the ring.
  template <int N>
  static __device__ __forceinline__ void add_product(float (&c)[D / 8][4],
                                                     const uint32_t (&p)[N][4], uint32_t b) {
    const uint64_t right = operand_descriptor<false, kDown>(b);
#pragma unroll
    for (unsigned i = 0; i < N; ++i) {
      wgmma_bf16<false>(c, p[i], right + i / 4 * (kBlockBytes / 16) + i % 4 * kNextK<false>);
    }
    wgmma_commit();
  }
};

// A block owns queries.
template <int D>
__device__ __forceinline__ void queries(const BackwardArgs& args, const TensorMap& q,
                                        const TensorMap& k, const TensorMap& v,
                                        const TensorMap& dout) {
  constexpr unsigned kKeys = 128;
  using R = Ring<D, kKeys>;
  extern __shared__ __align__(1024) char shared[];
  const R ring{{}, shared_address(shared)};
  ring.init();
  const Shape s = shape_of(args);
  const Owner owner(s, s.heads, true, blockIdx.x - args.key_blocks, gridDim.x - args.key_blocks);
  const unsigned* starts = starts_of(args.doc_starts, s, owner.seq);
  auto* here = starts ? reinterpret_cast<unsigned*>(shared + R::kStarts) : nullptr;
  unsigned key = uniform(first_visible<kThreads>(here, starts, owner.first, s.seq_len));
  key = key / kKeys * kKeys;
  const unsigned end = min(owner.first + kRows, s.seq_len);
  __syncthreads();
  const unsigned group = uniform(threadIdx.x / kWarpgroup);
  // 168 registers a thread at the launch, and as many in all after this.
  if (group == kWorkers) {
    release_registers<24>();
    if (threadIdx.x > kWorkers * kWarpgroup) return;
    ring.bring_owned(q, dout, owner.seq, owner.first, owner.head);
    const unsigned kv_head = owner.head / (s.heads / s.kv_heads);
    for (Turn<R::kStages> turn; key < end; key += kKeys, turn.next()) {
      ring.bring(turn, k, v, owner.seq, key, kv_head, 0);
    }
    return;
  }
  claim_registers<240>();
  const unsigned row = threadIdx.x / 32 * 16, query = owner.first + row;
  float log_sum[1][2], delta[1][2];
  row_statistics(log_sum, delta, args.statistics + spans_at(s, owner.seq, owner.head), query,
                 s.seq_len);
  const uint32_t left_q = ring.shared + group * R::kAcross * kBlockBytes;
  float sum[1][D / 8][4] = {};
  barrier_wait(ring.ready(), 0);
  for (Turn<R::kStages> turn; key < end; key += kKeys, turn.next()) {
    const uint32_t tile_k = ring.tile(turn.stage);
    barrier_wait(ring.full(turn.stage), turn.parity);
    const auto step = [&](auto& p, auto& dp) {
      constexpr unsigned N = sizeof(p) / sizeof(p[0][0]);
      // Descriptors are made in every step: kept, they would take registers from accumulators.
      uint32_t left = left_q;
      asm volatile("" : "+r"(left));
      wgmma_fence();
      R::multiply_rows(p[0], left, tile_k);
      R::multiply_rows(dp[0], left + R::kOwned, tile_k + R::kTile);
      wgmma_wait<1>();
      hold(p[0]);
      if (here || key + 8 * N > query + 1) mask(p, query, key, here ? here + row : nullptr);
      each(p, [&](float& p, int, int, int j) {
        p = exp2_approximate(p * s.scale - log_sum[0][j / 2]);
      });
      wgmma_wait<0>();
      hold(dp[0]);
      each(dp, [&](float& dp, int, int n, int j) { dp = p[0][n][j] * (dp - delta[0][j / 2]); });
      uint32_t ds[N / 2][4];
      pack(ds, dp[0]);
      hold(sum[0]);
      wgmma_fence();
      R::add_product(sum[0], ds, tile_k);
      wgmma_wait<0>();
      hold(sum[0]);
    };
    if (group == 0 && key == owner.first) {
      // The other half of the keys is above the diagonal.
      float p[1][kBlock / 8][4], dp[1][kBlock / 8][4];
      step(p, dp);
    } else {
      float p[1][kKeys / 8][4], dp[1][kKeys / 8][4];
      step(p, dp);
    }
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(turn.stage));
  }
  each(sum, [&](float& c, int, int, int) { c *= s.scale * kLn2; });
  // The result passes through the queries' memory, which other warps of the warpgroup may read.
  warpgroup_sync(group);
  store_rows<D>(rows_of(args.dq, s, owner.seq, owner.head, s.heads), owner.first, sum, shared, row);
}

// A block owns keys.
template <int D>
__device__ __forceinline__ void keys(const BackwardArgs& args, const TensorMap& q,
                                     const TensorMap& k, const TensorMap& v,
                                     const TensorMap& dout) {
  using R = Ring<D, kSpan>;
  extern __shared__ __align__(1024) char shared[];
  const R ring{{}, shared_address(shared)};
  ring.init();
  const Shape s = shape_of(args);
  const KeyOwner owner(args);
  const unsigned* starts = starts_of(args.doc_starts, s, owner.seq);
  const unsigned end = uniform(
      end_of_viewers<kThreads>(starts, owner.first, owner.first + kRows, s.seq_len,
                               reinterpret_cast<unsigned*>(shared + R::kStarts)));
  __syncthreads();
  const unsigned group = uniform(threadIdx.x / kWarpgroup);
  Turn<R::kStages> turn;
  if (group == kWorkers) {
    release_registers<24>();
    if (threadIdx.x > kWorkers * kWarpgroup) return;
    ring.bring_owned(k, v, owner.seq, owner.first, owner.kv_head);
    for (unsigned head = owner.head; head < owner.head + owner.heads; ++head) {
      const float* statistics = args.statistics + spans_at(s, owner.seq, head);
      for (unsigned query = owner.first; query < end; query += kSpan, turn.next()) {
        ring.bring(turn, q, dout, owner.seq, query, head, R::kSpanBytes);
        copy_bytes(ring.shared + R::kSpans + turn.stage * R::kSpanBytes,
                   statistics + query * 3, ring.full(turn.stage), R::kSpanBytes);
      }
    }
    return;
  }
  claim_registers<240>();
  const unsigned row = threadIdx.x / 32 * 16, key = owner.first + row;
  const uint32_t left_k = ring.shared + group * R::kAcross * kBlockBytes;
  float sum_k[1][D / 8][4] = {}, sum_v[1][D / 8][4] = {};
  barrier_wait(ring.ready(), 0);
  for (unsigned head = 0; head < owner.heads; ++head) {
    for (unsigned query = owner.first; query < end; query += kSpan, turn.next()) {
      const uint32_t tile_q = ring.tile(turn.stage), tile_dout = tile_q + R::kTile;
      barrier_wait(ring.full(turn.stage), turn.parity);
      // The first queries see no key of the second warpgroup.
      if (group == 0 || query > owner.first) {
        const char* at = shared + R::kSpans + turn.stage * R::kSpanBytes;
        const auto* columns = reinterpret_cast<const float*>(at) + column_of(0, 0);
        float p[1][kSpan / 8][4], dp[1][kSpan / 8][4];
        wgmma_fence();
        R::multiply_rows(p[0], left_k, tile_q);
        R::multiply_rows(dp[0], left_k + R::kOwned, tile_dout);
        wgmma_wait<1>();
        hold(p[0]);
        if (starts || query + 1 < key + 16) {
          mask_transposed(p, key, query, reinterpret_cast<const unsigned*>(at) + 2 * kSpan);
        }
        each(p, [&](float& p, int, int n, int j) {
          p = exp2_approximate(p * s.scale - columns[n * 8 + j % 2]);
        });
        uint32_t left_p[kSpan / 16][4], left_ds[kSpan / 16][4];
        pack(left_p, p[0]);
        wgmma_fence();
        R::add_product(sum_v[0], left_p, tile_dout);
        wgmma_wait<1>();
        hold(dp[0]);
        each(dp, [&](float& dp, int, int n, int j) {
          dp = p[0][n][j] * (dp - columns[kSpan + n * 8 + j % 2]);
        });
        pack(left_ds, dp[0]);
        wgmma_fence();
        R::add_product(sum_k[0], left_ds, tile_q);
        wgmma_wait<0>();
        hold(sum_v[0]);
        hold(sum_k[0]);
      }
      if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(turn.stage));
    }
  }
  // Results pass through the keys' and values' memory, which other warps of the warpgroup may read.
  warpgroup_sync(group);
  store_keys<D>(args, owner, sum_k, sum_v, shared, shared + R::kOwned, row);
}

template <int D>
__device__ __forceinline__ void both(const BackwardArgs& args, const TensorMap& q,
                                     const TensorMap& k, const TensorMap& v,
                                     const TensorMap& dout) {
  if (blockIdx.x < args.key_blocks) {
    keys<D>(args, q, k, v, dout);
  } else {
    queries<D>(args, q, k, v, dout);
  }
}

}  // namespace

// Blocks as there. q, k, v, dout: maps of [batch, seq_len, heads d] for blocks of 64 x 64.
extern "C" __global__ void __launch_bounds__(kThreads, 1) flash_attention_backward_wgmma_bf16_d64(
    const __grid_constant__ BackwardArgs args, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap dout) {
  both<64>(args, q, k, v, dout);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) flash_attention_backward_wgmma_bf16_d128(
    const __grid_constant__ BackwardArgs args, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
    const __grid_constant__ TensorMap dout) {
  both<128>(args, q, k, v, dout);
}
