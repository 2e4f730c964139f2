// Backward of causal grouped-query attention in blocks, after FlashAttention-2 (Dao 2023, arXiv
// 2307.08691), in two passes. With s = 1 / sqrt(d), P = 2^(log2(e) s Q K^T - log_sum), computed
// again, delta = rowsum(dout o) and dS = P (dout V^T - delta):
// dQ = s dS K, where a block owns queries; dV = P^T dout and dK = s dS^T Q, where a block owns keys
// and goes through the queries of all heads that read them, one head after the other.
//
// q, o, dout, dq: [T, heads d] bf16; k, v, dk, dv: [T, kv_heads d] bf16; log_sum from forward and
// delta, which the pass over queries leaves for the other: [batch, heads, seq_len] fp32;
// doc_starts: [T] u32 or null; more of them in common/attention.cuh. Arithmetic is fp32, P and dS
// are rounded to bf16 for products. Gradients are written (=), each by the one block that owns its
// rows, in a fixed order of sums.
//
// Least work for a head of n rows: 5 n^2 d FLOP; here 7 n^2 d, as both passes compute scores, which
// spares atomic or ordered sums. Least traffic: seven matrices once each; here each tile of 128 rows
// also reads all rows of the other side that it meets, which the L2 cache holds.

#include "common/attention.cuh"
#include "common/pack.cuh"

namespace {

constexpr float kLn2 = 0.6931471805599453f;

// Rows of the other side that a pass meets at a time.
constexpr unsigned kStream = 32;

// The end of the queries that see a key before `end`, from `first` on.
template <int kThreads>
__device__ __forceinline__ unsigned end_of_viewers(const unsigned* starts, unsigned first,
                                                   unsigned end, unsigned seq_len,
                                                   unsigned* last) {
  if (starts == nullptr) return seq_len;
  unsigned found = first;
  for (unsigned row = first + threadIdx.x; row < seq_len; row += kThreads) {
    if (starts[row] < end) found = row + 1;
  }
  found = __reduce_max_sync(0xffffffffu, found);
  if (threadIdx.x % 32 == 0) last[threadIdx.x / 32] = found;
  __syncthreads();
  for (unsigned warp = 0; warp < kThreads / 32; ++warp) found = max(found, last[warp]);
  return found;
}

// The same where rows are keys and columns are queries, with a start for each column.
template <int M, int N>
__device__ __forceinline__ void mask_transposed(float (&s)[M][N][4], unsigned key, unsigned query,
                                                const unsigned* starts) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned column = column_of(n, j), start = starts[column];
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned row = key + row_of(m, half);
          if (row > query + column || row < start) s[m][n][2 * half + j] = -INFINITY;
        }
      }
    }
  }
}

// Calls f(value, m, n, j) for every accumulator of this lane.
template <int M, int N, class F>
__device__ __forceinline__ void each(float (&c)[M][N][4], F f) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) f(c[m][n][j], m, n, j);
    }
  }
}

// delta of the block's queries; dout's rows are in a tile.
template <int D, int kThreads>
__device__ __forceinline__ void row_products(float* delta, const char* tile,
                                             const HeadRows<const __nv_bfloat16>& o,
                                             unsigned first) {
  constexpr unsigned kLanes = D / 8;
  const unsigned chunk = threadIdx.x % kLanes;
  for (unsigned row = threadIdx.x / kLanes; row < kRows; row += kThreads / kLanes) {
    float a[kWide], b[kWide] = {};
    load(a, reinterpret_cast<const __nv_bfloat16*>(tile + chunk_at<D>(row, chunk)));
    if (first + row < o.rows && chunk * kWide < o.d) {
      load(b, o.first + (first + row) * o.stride + chunk * kWide);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += a[i] * b[i];
#pragma unroll
    for (unsigned offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (chunk == 0) delta[row] = sum;
  }
}

// Two tiles that stay, two pairs of tiles that rows of the other side go through, and what is kept
// for single rows.
template <int D>
struct Backward {
  // 32 rows a warp where the accumulators leave room for them.
  static constexpr int kM = D == 64 ? 2 : 1, kN = kStream / 8;
  static constexpr int kThreads = kRows / (16 * kM) * 32;
  static constexpr unsigned kOwned = kRows * D * 2, kStreamed = kStream * D * 2;
  // delta and document starts of owned queries with a word for each warp, or the statistics of
  // two blocks of queries.
  static constexpr unsigned kStatistics = 2 * kOwned + 4 * kStreamed;
  static constexpr unsigned kShared = kStatistics + (2 * kRows + 8) * 4;
  static_assert(2 * 3 * kStream <= 2 * kRows + 8);

  // A block owns queries.
  static __device__ __forceinline__ void queries(
      __nv_bfloat16* dq, float* delta, const __nv_bfloat16* dout, const __nv_bfloat16* q,
      const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* o, const float* log_sum,
      const unsigned* doc_starts, const Shape& s) {
    extern __shared__ __align__(1024) char shared[];
    float* deltas = reinterpret_cast<float*>(shared + kStatistics);
    const Owner owner(s, s.heads, true);
    const unsigned kv_head = owner.head / (s.heads / s.kv_heads);
    const auto keys = rows_of(k, s, owner.seq, kv_head, s.kv_heads);
    const auto values = rows_of(v, s, owner.seq, kv_head, s.kv_heads);
    const uint32_t tile_q = shared_address(shared), tile_dout = tile_q + kOwned;
    const uint32_t streamed = tile_dout + kOwned;
    const auto fetch = [&](unsigned key, unsigned stage) {
      const uint32_t tile = streamed + stage * 2 * kStreamed;
      load_tile<D, kStream, kThreads>(tile, keys, key);
      load_tile<D, kStream, kThreads>(tile + kStreamed, values, key);
      copy_commit();
    };
    const unsigned* starts = starts_of(doc_starts, s, owner.seq);
    auto* here = starts ? reinterpret_cast<unsigned*>(deltas + kRows) : nullptr;
    unsigned key =
        first_visible<kThreads>(here, starts, owner.first, s.seq_len) / kStream * kStream;
    const unsigned end = min(owner.first + kRows, s.seq_len);
    load_tile<D, kRows, kThreads>(tile_q, rows_of(q, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_dout, rows_of(dout, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    fetch(key, 0);
    copy_wait<0>();
    __syncthreads();
    const size_t at = statistics_at(s, owner.seq, owner.head);
    row_products<D, kThreads>(deltas, shared + kOwned,
                              rows_of(o, s, owner.seq, owner.head, s.heads), owner.first);
    __syncthreads();
    const unsigned mine = owner.first + threadIdx.x;
    if (mine < end) delta[at + mine] = deltas[threadIdx.x];

    const unsigned row = threadIdx.x / 32 * 16 * kM, query = owner.first + row;
    float row_log_sum[kM][2], row_delta[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned r = query + row_of(m, half);
        row_log_sum[m][half] = r < s.seq_len ? log_sum[at + r] : 0.0f;
        row_delta[m][half] = deltas[row + row_of(m, half)];
      }
    }
    const LeftRows<D == 128, D, kM> left_q(lane_of_a<D>(tile_q) + row * D * 2);
    const LeftRows<D == 128, D, kM> left_dout(lane_of_a<D>(tile_dout) + row * D * 2);
    float sum[kM][D / 8][4] = {};
    for (unsigned stage = 0; key < end; key += kStream, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();
      if (key + kStream < end) fetch(key + kStream, stage ^ 1);
      // Whole warps above the diagonal have nothing to add.
      if (key >= query + 16 * kM) continue;
      const uint32_t tile_k = streamed + stage * 2 * kStreamed, tile_v = tile_k + kStreamed;
      float p[kM][kN][4] = {}, dp[kM][kN][4] = {};
      add_product_of_rows<D>(p, left_q, lane_of_b<D>(tile_k));
      add_product_of_rows<D>(dp, left_dout, lane_of_b<D>(tile_v));
      if (here || key + kStream > query + 1) mask(p, query, key, here ? here + row : nullptr);
      each(dp, [&](float& dp, int m, int n, int j) {
        const float weight = exp2_approximate(p[m][n][j] * s.scale - row_log_sum[m][j / 2]);
        dp = weight * (dp - row_delta[m][j / 2]);
      });
      add_product<D>(sum, dp, lane_of_a<D>(tile_k));
    }
    each(sum, [&](float& c, int, int, int) { c *= s.scale * kLn2; });
    store_rows<D>(rows_of(dq, s, owner.seq, owner.head, s.heads), owner.first, sum, shared, row);
  }

  // A block owns keys and values of one key/value head and goes through the queries of all heads
  // that read it.
  static __device__ __forceinline__ void keys(
      __nv_bfloat16* dk, __nv_bfloat16* dv, const __nv_bfloat16* dout, const __nv_bfloat16* q,
      const __nv_bfloat16* k, const __nv_bfloat16* v, const float* log_sum, const float* delta,
      const unsigned* doc_starts, const Shape& s) {
    extern __shared__ __align__(1024) char shared[];
    float* statistics = reinterpret_cast<float*>(shared + kStatistics);
    const Owner owner(s, s.kv_heads, false);
    const unsigned group = s.heads / s.kv_heads;
    const uint32_t tile_k = shared_address(shared), tile_v = tile_k + kOwned;
    const uint32_t streamed = tile_v + kOwned;
    const unsigned* starts = starts_of(doc_starts, s, owner.seq);
    const unsigned end = end_of_viewers<kThreads>(starts, owner.first, owner.first + kRows,
                                                  s.seq_len,
                                                  reinterpret_cast<unsigned*>(statistics));
    if (starts) __syncthreads();
    // The next block of queries to bring.
    unsigned head = owner.head * group, next = owner.first;
    const auto fetch = [&](unsigned stage) {
      const uint32_t tile = streamed + stage * 2 * kStreamed;
      load_tile<D, kStream, kThreads>(tile, rows_of(q, s, owner.seq, head, s.heads), next);
      load_tile<D, kStream, kThreads>(tile + kStreamed,
                                      rows_of(dout, s, owner.seq, head, s.heads), next);
      const size_t at = statistics_at(s, owner.seq, head);
      load_statistics(shared_address(statistics + stage * 3 * kStream), log_sum + at, delta + at,
                      starts, next, s.seq_len);
      copy_commit();
      next += kStream;
      if (next >= end) {
        next = owner.first;
        ++head;
      }
    };
    load_tile<D, kRows, kThreads>(tile_k, rows_of(k, s, owner.seq, owner.head, s.kv_heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_v, rows_of(v, s, owner.seq, owner.head, s.kv_heads),
                                  owner.first);
    fetch(0);

    const unsigned row = threadIdx.x / 32 * 16 * kM, key = owner.first + row;
    unsigned last = owner.first;
    float sum_k[kM][D / 8][4] = {}, sum_v[kM][D / 8][4] = {};
    const unsigned steps = (end - owner.first + kStream - 1) / kStream * group;
    for (unsigned step = 0; step < steps; ++step) {
      copy_wait<0>();
      __syncthreads();
      const unsigned stage = step % 2, query = last;
      last = next;
      if (step + 1 < steps) fetch(stage ^ 1);
      // Whole warps below the diagonal have nothing to add.
      if (query + kStream <= key) continue;
      const uint32_t tile_q = streamed + stage * 2 * kStreamed, tile_dout = tile_q + kStreamed;
      const float* columns = statistics + stage * 3 * kStream;
      float p[kM][kN][4] = {}, dp[kM][kN][4] = {};
      add_product_of_rows<D>(p, lane_of_a<D>(tile_k) + row * D * 2, lane_of_b<D>(tile_q));
      if (starts || query + 1 < key + 16 * kM) {
        mask_transposed(p, key, query, reinterpret_cast<const unsigned*>(columns) + 2 * kStream);
      }
      each(p, [&](float& p, int, int n, int j) {
        p = exp2_approximate(p * s.scale - columns[column_of(n, j % 2)]);
      });
      add_product_of_rows<D>(dp, lane_of_a<D>(tile_v) + row * D * 2, lane_of_b<D>(tile_dout));
      each(dp, [&](float& dp, int m, int n, int j) {
        dp = p[m][n][j] * (dp - columns[kStream + column_of(n, j % 2)]);
      });
      add_product<D>(sum_v, p, lane_of_a<D>(tile_dout));
      add_product<D>(sum_k, dp, lane_of_a<D>(tile_q));
    }
    each(sum_k, [&](float& c, int, int, int) { c *= s.scale * kLn2; });
    store_rows<D>(rows_of(dk, s, owner.seq, owner.head, s.kv_heads), owner.first, sum_k, shared,
                  row);
    store_rows<D>(rows_of(dv, s, owner.seq, owner.head, s.kv_heads), owner.first, sum_v,
                  shared + kOwned, row);
  }

  // Starts to bring log_sum, delta and document starts of kStream queries to three rows in shared
  // memory; those that are not there become 0.
  static __device__ __forceinline__ void load_statistics(uint32_t to, const float* log_sum,
                                                         const float* delta,
                                                         const unsigned* starts, unsigned query,
                                                         unsigned rows) {
    if (threadIdx.x >= 3 * kStream) return;
    const unsigned kind = threadIdx.x / kStream, at = query + threadIdx.x % kStream;
    const void* source = kind == 0 ? log_sum + at : delta + at;
    if (kind == 2) source = starts + at;
    const bool valid = at < rows && (kind < 2 || starts);
    copy_async_word(to + threadIdx.x * 4, valid ? source : log_sum, valid);
  }
};

}  // namespace

// One block for each 128 queries of each query head and sequence, with Backward<D>::kShared bytes
// of dynamic shared memory; seq_len >= 1, start_i <= i, scale = log2(e) / sqrt(d).
extern "C" __global__ void __launch_bounds__(Backward<64>::kThreads)
    flash_attention_backward_q_bf16_d64(
        __nv_bfloat16* __restrict__ dq, float* __restrict__ delta,
        const __nv_bfloat16* __restrict__ dout, const __nv_bfloat16* __restrict__ q,
        const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
        const __nv_bfloat16* __restrict__ o, const float* __restrict__ log_sum,
        const unsigned* __restrict__ doc_starts, unsigned seq_len, unsigned heads,
        unsigned kv_heads, unsigned d, float scale) {
  Backward<64>::queries(dq, delta, dout, q, k, v, o, log_sum, doc_starts,
                       {seq_len, heads, kv_heads, d, scale});
}

extern "C" __global__ void __launch_bounds__(Backward<128>::kThreads)
    flash_attention_backward_q_bf16_d128(
        __nv_bfloat16* __restrict__ dq, float* __restrict__ delta,
        const __nv_bfloat16* __restrict__ dout, const __nv_bfloat16* __restrict__ q,
        const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
        const __nv_bfloat16* __restrict__ o, const float* __restrict__ log_sum,
        const unsigned* __restrict__ doc_starts, unsigned seq_len, unsigned heads,
        unsigned kv_heads, unsigned d, float scale) {
  Backward<128>::queries(dq, delta, dout, q, k, v, o, log_sum, doc_starts,
                       {seq_len, heads, kv_heads, d, scale});
}

// The same for each 128 keys of each key/value head, after the pass over queries.
extern "C" __global__ void __launch_bounds__(Backward<64>::kThreads)
    flash_attention_backward_kv_bf16_d64(
        __nv_bfloat16* __restrict__ dk, __nv_bfloat16* __restrict__ dv,
        const __nv_bfloat16* __restrict__ dout, const __nv_bfloat16* __restrict__ q,
        const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
        const float* __restrict__ log_sum, const float* __restrict__ delta,
        const unsigned* __restrict__ doc_starts, unsigned seq_len, unsigned heads,
        unsigned kv_heads, unsigned d, float scale) {
  Backward<64>::keys(dk, dv, dout, q, k, v, log_sum, delta, doc_starts,
                    {seq_len, heads, kv_heads, d, scale});
}

extern "C" __global__ void __launch_bounds__(Backward<128>::kThreads)
    flash_attention_backward_kv_bf16_d128(
        __nv_bfloat16* __restrict__ dk, __nv_bfloat16* __restrict__ dv,
        const __nv_bfloat16* __restrict__ dout, const __nv_bfloat16* __restrict__ q,
        const __nv_bfloat16* __restrict__ k, const __nv_bfloat16* __restrict__ v,
        const float* __restrict__ log_sum, const float* __restrict__ delta,
        const unsigned* __restrict__ doc_starts, unsigned seq_len, unsigned heads,
        unsigned kv_heads, unsigned d, float scale) {
  Backward<128>::keys(dk, dv, dout, q, k, v, log_sum, delta, doc_starts,
                    {seq_len, heads, kv_heads, d, scale});
}
