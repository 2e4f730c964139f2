// Forward of causal grouped-query attention in blocks, after FlashAttention-2 (Dao 2023, arXiv
// 2307.08691) with the online softmax of Milakov and Gimelshein (arXiv 1805.02867): for each head
// O = softmax(s Q K^T) V over the keys that a row sees, s = 1 / sqrt(d).
//
// q, o: [T, heads d] bf16; k, v: [T, kv_heads d] bf16; doc_starts: [T] u32 or null; more of them
// in common/attention.cuh. Scores, softmax and sums are fp32, the weights are rounded to bf16 for
// the product with V. Saved for backward: q, k, v, o and log_sum [batch, heads, seq_len] fp32, the
// base-2 logarithm of the softmax's denominator.
//
// Least work for a head of n rows: 2 n^2 d FLOP. Least traffic: Q, K, V and O once each; here each
// tile of 128 queries also reads all keys and values that it sees, which the L2 cache holds.

#include "common/attention.cuh"
#include "common/online_softmax.cuh"

namespace {

// A block owns 128 queries of a head, a warp 32 of them. Keys and values go through two pairs of
// tiles: while one is worked on, the next rows arrive in the other.
template <int D>
struct Forward {
  // Keys of a step: as many as registers hold scores of beside the output.
  static constexpr unsigned kKeys = D == 64 ? 64 : 32;
  static constexpr int kM = 2, kThreads = 128;
  static constexpr unsigned kTileQ = kRows * D * 2, kTileK = kKeys * D * 2;
  // Document starts of the queries, and a word for each warp.
  static constexpr unsigned kStarts = kTileQ + 4 * kTileK, kShared = kStarts + (kRows + 8) * 4;

  static __device__ __forceinline__ void run(__nv_bfloat16* o, float* log_sum,
                                             const __nv_bfloat16* q, const __nv_bfloat16* k,
                                             const __nv_bfloat16* v, const unsigned* doc_starts,
                                             const Shape& s) {
    extern __shared__ __align__(1024) char shared[];
    const Owner owner(s, s.heads, true, blockIdx.x, gridDim.x);
    const unsigned kv_head = owner.head / (s.heads / s.kv_heads);
    const auto keys = rows_of(k, s, owner.seq, kv_head, s.kv_heads);
    const auto values = rows_of(v, s, owner.seq, kv_head, s.kv_heads);
    const uint32_t tile_q = shared_address(shared), streamed = tile_q + kTileQ;
    const auto fetch = [&](unsigned key, unsigned stage) {
      const uint32_t tile = streamed + stage * 2 * kTileK;
      load_tile<D, kKeys, kThreads>(tile, keys, key);
      load_tile<D, kKeys, kThreads>(tile + kTileK, values, key);
      copy_commit();
    };
    const unsigned* starts = starts_of(doc_starts, s, owner.seq);
    auto* here = starts ? reinterpret_cast<unsigned*>(shared + kStarts) : nullptr;
    unsigned key = first_visible<kThreads>(here, starts, owner.first, s.seq_len) / kKeys * kKeys;
    const unsigned end = min(owner.first + kRows, s.seq_len);
    load_tile<D, kRows, kThreads>(tile_q, rows_of(q, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    fetch(key, 0);
    copy_wait<0>();
    __syncthreads();

    const unsigned row = threadIdx.x / 32 * 16 * kM, query = owner.first + row;
    const LeftRows<D == 64, D, kM> left(lane_of_a<D>(tile_q) + row * D * 2);
    Softmax<kM> softmax;
    float out[kM][D / 8][4] = {};
    for (unsigned stage = 0; key < end; key += kKeys, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();
      if (key + kKeys < end) fetch(key + kKeys, stage ^ 1);
      // Whole warps above the diagonal have nothing to add.
      if (key >= query + 16 * kM) continue;
      const uint32_t tile_k = streamed + stage * 2 * kTileK, tile_v = tile_k + kTileK;
      float p[kM][kKeys / 8][4] = {};
      add_product_of_rows<D>(p, left, lane_of_b<D>(tile_k));
      if (here || key + kKeys > query + 1) mask(p, query, key, here ? here + row : nullptr);
      softmax.step(p, out, s.scale);
      add_product<D>(out, p, lane_of_a<D>(tile_v));
    }
    log_sum += statistics_at(s, owner.seq, owner.head);
    softmax.finish(out, s.scale, log_sum, query, s.seq_len);
    store_rows<D>(rows_of(o, s, owner.seq, owner.head, s.heads), owner.first, out, shared, row);
  }
};

}  // namespace

// One block for each 128 queries of each query head and sequence, with Forward<D>::kShared bytes of
// dynamic shared memory; seq_len >= 1, start_i <= i, scale = log2(e) / sqrt(d).
extern "C" __global__ void __launch_bounds__(Forward<64>::kThreads)
    flash_attention_forward_bf16_d64(
        __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
        const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
        const __nv_bfloat16* __restrict__ v, const unsigned* __restrict__ doc_starts,
        unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  Forward<64>::run(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
}

extern "C" __global__ void __launch_bounds__(Forward<128>::kThreads)
    flash_attention_forward_bf16_d128(
        __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
        const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
        const __nv_bfloat16* __restrict__ v, const unsigned* __restrict__ doc_starts,
        unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  Forward<128>::run(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
}
