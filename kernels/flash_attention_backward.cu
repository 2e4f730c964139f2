// Backward of causal grouped-query attention in blocks, after FlashAttention-2 (Dao 2023, arXiv
// 2307.08691), in two passes. With s = 1 / sqrt(d), P = 2^(log2(e) s Q K^T - log_sum), computed
// again, delta = rowsum(dout o) and dS = P (dout V^T - delta):
// dQ = s dS K, where a block owns queries; dV = P^T dout and dK = s dS^T Q, where a block owns keys
// and goes through the queries of heads that read them, one head after the other.
//
// q, o, dout, dq: [T, heads d] bf16; k, v, dk, dv: [T, kv_heads d] bf16; log_sum from forward:
// [batch, heads, seq_len] fp32; doc_starts: [T] u32 or null; more of them in common/attention.cuh.
// Arithmetic is fp32, P and dS are rounded to bf16 for products. A first kernel lays down delta and
// what else the passes need of each query; they run side by side in one grid, so that the short
// blocks of one fill the gaps of the other. Where there are few blocks, several share the heads of
// a key/value head, and a last kernel adds their sums in a fixed order. Gradients are written (=),
// each by the one block or thread that owns them, in a fixed order of sums.
//
// Least work for a head of n rows: 5 n^2 d FLOP; here 7 n^2 d, as both passes compute scores, which
// spares atomic or ordered sums. Least traffic: seven matrices once each; here each tile of 128 rows
// also reads all rows of the other side that it meets, which the L2 cache holds.

#include "common/attention_backward.cuh"
#include "common/pack.cuh"

namespace {

// Rows of the other side that a pass meets at a time.
constexpr unsigned kStream = 32;

// Two tiles that stay, two pairs of tiles that rows of the other side go through, and what is kept
// for single rows.
template <int D>
struct Backward {
  // 32 rows a warp where the accumulators leave room for them.
  static constexpr int kM = D == 64 ? 2 : 1, kN = kStream / 8;
  static constexpr int kThreads = kRows / (16 * kM) * 32;
  static constexpr unsigned kOwned = kRows * D * 2, kStreamed = kStream * D * 2;
  // Document starts of owned queries with a word for each warp, or the statistics of two blocks of
  // queries.
  static constexpr unsigned kStatistics = 2 * kOwned + 4 * kStreamed;
  static_assert(kRows + kThreads / 32 <= 2 * 3 * kStream);

  // A block owns queries.
  static __device__ __forceinline__ void queries(const BackwardArgs& args) {
    extern __shared__ __align__(1024) char shared[];
    const Shape s = shape_of(args);
    const Owner owner(s, s.heads, true, blockIdx.x - args.key_blocks,
                      gridDim.x - args.key_blocks);
    const unsigned kv_head = owner.head / (s.heads / s.kv_heads);
    const auto keys = rows_of(args.k, s, owner.seq, kv_head, s.kv_heads);
    const auto values = rows_of(args.v, s, owner.seq, kv_head, s.kv_heads);
    const uint32_t tile_q = shared_address(shared), tile_dout = tile_q + kOwned;
    const uint32_t streamed = tile_dout + kOwned;
    const auto fetch = [&](unsigned key, unsigned stage) {
      const uint32_t tile = streamed + stage * 2 * kStreamed;
      load_tile<D, kStream, kThreads>(tile, keys, key);
      load_tile<D, kStream, kThreads>(tile + kStreamed, values, key);
      copy_commit();
    };
    const unsigned* starts = starts_of(args.doc_starts, s, owner.seq);
    auto* here = starts ? reinterpret_cast<unsigned*>(shared + kStatistics) : nullptr;
    unsigned key =
        first_visible<kThreads>(here, starts, owner.first, s.seq_len) / kStream * kStream;
    const unsigned end = min(owner.first + kRows, s.seq_len);
    load_tile<D, kRows, kThreads>(tile_q, rows_of(args.q, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_dout, rows_of(args.dout, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    fetch(key, 0);
    copy_wait<0>();
    __syncthreads();

    const unsigned row = threadIdx.x / 32 * 16 * kM, query = owner.first + row;
    float row_log_sum[kM][2], row_delta[kM][2];
    row_statistics(row_log_sum, row_delta, args.statistics + spans_at(s, owner.seq, owner.head),
                   query, s.seq_len);
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
    store_rows<D>(rows_of(args.dq, s, owner.seq, owner.head, s.heads), owner.first, sum, shared,
                  row);
  }

  // A block owns keys and values of one key/value head and goes through the queries of heads that
  // read it.
  static __device__ __forceinline__ void keys(const BackwardArgs& args) {
    extern __shared__ __align__(1024) char shared[];
    float* statistics = reinterpret_cast<float*>(shared + kStatistics);
    const Shape s = shape_of(args);
    const KeyOwner owner(args);
    const uint32_t tile_k = shared_address(shared), tile_v = tile_k + kOwned;
    const uint32_t streamed = tile_v + kOwned;
    const unsigned* starts = starts_of(args.doc_starts, s, owner.seq);
    const unsigned end = end_of_viewers<kThreads>(starts, owner.first, owner.first + kRows,
                                                  s.seq_len,
                                                  reinterpret_cast<unsigned*>(statistics));
    if (starts) __syncthreads();
    // The next block of queries to bring.
    unsigned head = owner.head, next = owner.first;
    const auto fetch = [&](unsigned stage) {
      const uint32_t tile = streamed + stage * 2 * kStreamed;
      load_tile<D, kStream, kThreads>(tile, rows_of(args.q, s, owner.seq, head, s.heads), next);
      load_tile<D, kStream, kThreads>(tile + kStreamed,
                                      rows_of(args.dout, s, owner.seq, head, s.heads), next);
      load_statistics(shared_address(statistics + stage * 3 * kStream),
                      args.statistics + spans_at(s, owner.seq, head), next);
      copy_commit();
      next += kStream;
      if (next >= end) {
        next = owner.first;
        ++head;
      }
    };
    load_tile<D, kRows, kThreads>(tile_k, rows_of(args.k, s, owner.seq, owner.kv_head, s.kv_heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_v, rows_of(args.v, s, owner.seq, owner.kv_head, s.kv_heads),
                                  owner.first);
    fetch(0);

    const unsigned row = threadIdx.x / 32 * 16 * kM, key = owner.first + row;
    unsigned last = owner.first;
    float sum_k[kM][D / 8][4] = {}, sum_v[kM][D / 8][4] = {};
    const unsigned steps = (end - owner.first + kStream - 1) / kStream * owner.heads;
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
    store_keys<D>(args, owner, sum_k, sum_v, shared, shared + kOwned, row);
  }

  // Starts to bring the statistics of kStream queries to three rows in shared memory.
  static __device__ __forceinline__ void load_statistics(uint32_t to, const float* statistics,
                                                         unsigned query) {
    static_assert(kSpan % kStream == 0);
    constexpr unsigned kChunks = kStream / 4;
    if (threadIdx.x >= 3 * kChunks) return;
    const unsigned kind = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    const unsigned span = query / kSpan * 3 + kind;
    copy_async(to + threadIdx.x * 16, statistics + span * kSpan + query % kSpan + chunk * 4, 16);
  }

  static __device__ __forceinline__ void both(const BackwardArgs& args) {
    if (blockIdx.x < args.key_blocks) {
      keys(args);
    } else {
      queries(args);
    }
  }
};

}  // namespace

// One block for each kSpan queries of each query head and sequence: their statistics. Least
// traffic: o, dout and log_sum once, three words a query and head written.
extern "C" __global__ void __launch_bounds__(256)
    flash_attention_backward_statistics_bf16(const __grid_constant__ BackwardArgs args) {
  __shared__ float found[kSpan];
  const Shape s = shape_of(args);
  const unsigned spans = (s.seq_len + kSpan - 1) / kSpan;
  const unsigned first = blockIdx.x % spans * kSpan, other = blockIdx.x / spans;
  const unsigned head = other % s.heads, seq = other / s.heads;
  const auto o = rows_of(args.o, s, seq, head, s.heads);
  const auto dout = rows_of(args.dout, s, seq, head, s.heads);
  const unsigned lanes = s.d > 64 ? 16 : 8, chunk = threadIdx.x % lanes;
#pragma unroll 4
  for (unsigned row = threadIdx.x / lanes; row < kSpan; row += 256 / lanes) {
    float a[kWide] = {}, b[kWide] = {};
    if (first + row < s.seq_len && chunk * kWide < s.d) {
      const size_t at = (first + row) * o.stride + chunk * kWide;
      load(a, o.first + at);
      load(b, dout.first + at);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += a[i] * b[i];
    for (unsigned offset = lanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (chunk == 0) found[row] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 3 * kSpan) return;
  const unsigned kind = threadIdx.x / kSpan, row = threadIdx.x % kSpan, query = first + row;
  float value = 0.0f;
  if (query < s.seq_len) {
    const unsigned* starts = starts_of(args.doc_starts, s, seq);
    if (kind == 0) value = args.log_sum[statistics_at(s, seq, head) + query];
    if (kind == 1) value = found[row];
    if (kind == 2 && starts) value = __uint_as_float(starts[query]);
  }
  args.statistics[size_t(blockIdx.x) * 3 * kSpan + threadIdx.x] = value;
}

// One block for each 128 keys of each key/value head, its part of the query heads and each
// sequence, then one for each 128 queries of each query head and sequence, after the statistics;
// seq_len >= 1, start_i <= i, scale = log2(e) / sqrt(d). Dynamic shared memory holds kStatistics
// bytes and the statistics.
extern "C" __global__ void __launch_bounds__(Backward<64>::kThreads)
    flash_attention_backward_bf16_d64(const __grid_constant__ BackwardArgs args) {
  Backward<64>::both(args);
}

extern "C" __global__ void __launch_bounds__(Backward<128>::kThreads)
    flash_attention_backward_bf16_d128(const __grid_constant__ BackwardArgs args) {
  Backward<128>::both(args);
}

// dk and dv from the parts of their sums, `size` values each; a thread for four values of both.
// Least traffic: 8 parts size bytes, and the gradients written.
extern "C" __global__ void __launch_bounds__(256)
    flash_attention_backward_sum_bf16(const __grid_constant__ BackwardArgs args, unsigned size) {
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at >= 2 * size_t(size)) return;
  float sum[kWideFloat] = {};
  for (unsigned part = 0; part < args.parts; ++part) {
    const float4 v = *reinterpret_cast<const float4*>(args.partial + part * 2 * size_t(size) + at);
    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
  }
  store(at < size ? args.dk + at : args.dv + (at - size), sum);
}
