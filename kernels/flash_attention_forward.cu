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

namespace {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Online softmax of M x 16 rows, each spread over the four lanes of a quad.
template <int M>
struct Softmax {
  // Largest score of a row so far, and this lane's part of the sum of 2^(scale (score - it)).
  float largest[M][2], sum[M][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      largest[m][0] = largest[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // Turns scores into 2^(scale (score - maximum)) and brings sum and o to the new maximum.
  template <int N, int kColumns>
  __device__ __forceinline__ void step(float (&p)[M][N][4], float (&o)[M][kColumns][4],
                                       float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = largest[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          high = fmaxf(high, fmaxf(p[m][n][2 * half], p[m][n][2 * half + 1]));
        }
        high = quad_max(high);
        // A row that has seen nothing yet has no maximum to subtract.
        const float base = high == -INFINITY ? 0.0f : high * scale;
        const float shrink = exp2_approximate(largest[m][half] * scale - base);
        largest[m][half] = high;
        float total = sum[m][half] * shrink;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            p[m][n][j] = exp2_approximate(p[m][n][j] * scale - base);
            total += p[m][n][j];
          }
        }
        sum[m][half] = total;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          o[m][n][2 * half] *= shrink;
          o[m][n][2 * half + 1] *= shrink;
        }
      }
    }
  }

  // Divides o by the sums and writes the rows' logarithms to log_sum[row].
  template <int kColumns>
  __device__ __forceinline__ void finish(float (&o)[M][kColumns][4], float scale, float* log_sum,
                                         unsigned first, unsigned rows) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[m][half]);
        const unsigned row = first + row_of(m, half);
        if (threadIdx.x % 4 == 0 && row < rows) {
          log_sum[row] = largest[m][half] * scale + __log2f(total);
        }
        const float inverse = __fdividef(1.0f, total);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          o[m][n][2 * half] *= inverse;
          o[m][n][2 * half + 1] *= inverse;
        }
      }
    }
  }
};

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
    const Owner owner(s, s.heads, true);
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
