// Causal grouped-query attention in blocks, after FlashAttention-2 (Dao 2023, arXiv 2307.08691)
// with the online softmax of Milakov and Gimelshein (arXiv 1805.02867): O = softmax(Q K^T s) V
// for each head, s = 1 / sqrt(d). Row i of a sequence sees keys start_i <= j <= i.
//
// q, o, dq, dout: [T, heads d] bf16; k, v, dk, dv: [T, kv_heads d] bf16; T = batch seq_len, d at
// most the template's D. doc_starts: [T] u32 with start_i, or null for start_i = 0. Query head h
// reads key/value head h / (heads / kv_heads). Scores, softmax and sums are fp32; P and dS are
// rounded to bf16 for the products with tensor cores.
// Saved for backward: q, k, v, o and log_sum [batch, heads, seq_len] fp32, the base-2 logarithm
// of the softmax's denominator. Backward recomputes P; with delta = rowsum(dout o), fp32 of
// log_sum's shape, and dS = P (dout V^T - delta): dV = P^T dout, dQ = s dS K, dK = s dS^T Q.
// All results are written (=), each by the one block that owns its rows, in a fixed order of sums.
//
// Least work per head for n rows: 2 n^2 d FLOP forward and 5 n^2 d backward; here 7 n^2 d, as dQ
// and dK, dV come from two passes, which spares atomic or ordered sums. Least traffic: Q, K, V
// and O once each way; here a tile of 128 rows also reads all rows of the other side that it
// meets, from the L2 cache where that holds a head's K and V (or Q and dO).

#include "common/head_tile.cuh"
#include "common/pack.cuh"

namespace {

constexpr float kLn2 = 0.6931471805599453f;

// Rows that a block owns: queries, or keys in the pass for dK and dV.
constexpr unsigned kRows = 128;
// Keys that forward meets at a time.
constexpr unsigned kKeys = 64;
// Rows of the other side that a backward pass meets at a time.
constexpr unsigned kStream = 32;

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

struct Shape {
  unsigned seq_len, heads, kv_heads, d;
  // Scores times this are in base 2: log2(e) / sqrt(d).
  float scale;
};

// One head's rows of one sequence in a [T, heads d] matrix.
template <class T>
__device__ __forceinline__ HeadRows<T> rows_of(T* matrix, const Shape& s, unsigned seq,
                                               unsigned head, unsigned heads) {
  return {matrix + (size_t(seq) * s.seq_len * heads + head) * s.d, size_t(heads) * s.d, s.seq_len,
          s.d};
}

// Position of a head's first row in a [batch, heads, seq_len] array.
__device__ __forceinline__ size_t statistics_at(const Shape& s, unsigned seq, unsigned head) {
  return (size_t(seq) * s.heads + head) * s.seq_len;
}

__device__ __forceinline__ const unsigned* starts_of(const unsigned* doc_starts, const Shape& s,
                                                     unsigned seq) {
  return doc_starts ? doc_starts + size_t(seq) * s.seq_len : nullptr;
}

// What a block owns: kRows rows of one head of one sequence. Blocks with the most work come first:
// late queries, early keys.
struct Owner {
  unsigned first, head, seq;

  __device__ __forceinline__ Owner(const Shape& s, unsigned heads, bool late_first) {
    const unsigned tiles = (s.seq_len + kRows - 1) / kRows, others = gridDim.x / tiles;
    const unsigned tile = blockIdx.x / others, other = blockIdx.x % others;
    first = (late_first ? tiles - 1 - tile : tile) * kRows;
    head = other % heads;
    seq = other / heads;
  }
};

// The first of the keys that any of the block's queries sees; `least` is a word for each warp.
// `starts` is the sequence's.
template <int kThreads>
__device__ __forceinline__ unsigned first_visible(const unsigned* starts, unsigned first,
                                                  unsigned seq_len, unsigned* least) {
  if (starts == nullptr) return 0;
  unsigned found = 0xffffffffu;
  for (unsigned row = first + threadIdx.x; row < min(first + kRows, seq_len); row += kThreads) {
    found = min(found, starts[row]);
  }
  found = __reduce_min_sync(0xffffffffu, found);
  if (threadIdx.x % 32 == 0) least[threadIdx.x / 32] = found;
  __syncthreads();
  for (unsigned warp = 0; warp < kThreads / 32; ++warp) found = min(found, least[warp]);
  return found;
}

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

// Row of accumulator entry (m, half) within the warp's rows.
__device__ __forceinline__ unsigned row_of(int m, int half) {
  return m * 16 + half * 8 + threadIdx.x % 32 / 4;
}

// Column of accumulator entry (n, j).
__device__ __forceinline__ unsigned column_of(int n, int j) {
  return n * 8 + threadIdx.x % 4 * 2 + j;
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
        const float inverse = 1.0f / total;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          o[m][n][2 * half] *= inverse;
          o[m][n][2 * half + 1] *= inverse;
        }
      }
    }
  }
};

// Scores that a query may not see become minus infinity: rows are queries, columns are keys.
template <int M, int N>
__device__ __forceinline__ void mask(float (&s)[M][N][4], unsigned query, unsigned key,
                                     const unsigned (&starts)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned column = key + column_of(n, j % 2);
        const bool visible = column <= query + row_of(m, j / 2) && column >= starts[m][j / 2];
        if (!visible) s[m][n][j] = -INFINITY;
      }
    }
  }
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

template <int M, int N>
__device__ __forceinline__ void scale_all(float (&c)[M][N][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) c[m][n][j] *= factor;
    }
  }
}

// The document starts of the warp's queries; 0 for all without documents.
template <int M>
__device__ __forceinline__ void load_starts(unsigned (&to)[M][2], const unsigned* starts,
                                            unsigned first, unsigned rows) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = first + row_of(m, half);
      to[m][half] = starts != nullptr && row < rows ? starts[row] : 0;
    }
  }
}

// A block owns 128 queries of a head, a warp 32 of them. K and V have one tile each: V's next
// rows arrive while Q K^T is computed, K's while P V is.
template <int D>
struct Forward {
  static constexpr int kM = 2, kThreads = 128;
  static constexpr unsigned kTileQ = kRows * D * 2, kTileK = kKeys * D * 2;

  static __device__ __forceinline__ void run(__nv_bfloat16* o, float* log_sum,
                                             const __nv_bfloat16* q, const __nv_bfloat16* k,
                                             const __nv_bfloat16* v, const unsigned* doc_starts,
                                             const Shape& s) {
    extern __shared__ __align__(1024) char shared[];
    const Owner owner(s, s.heads, true);
    const unsigned kv_head = owner.head / (s.heads / s.kv_heads);
    const auto keys = rows_of(k, s, owner.seq, kv_head, s.kv_heads);
    const auto values = rows_of(v, s, owner.seq, kv_head, s.kv_heads);
    const unsigned* starts = starts_of(doc_starts, s, owner.seq);
    // The tiles are not in use yet.
    unsigned key = first_visible<kThreads>(starts, owner.first, s.seq_len,
                                           reinterpret_cast<unsigned*>(shared)) /
                   kKeys * kKeys;
    if (starts) __syncthreads();
    const unsigned end = min(owner.first + kRows, s.seq_len);
    const uint32_t tile_q = shared_address(shared), tile_k = tile_q + kTileQ;
    const uint32_t tile_v = tile_k + kTileK;
    load_tile<D, kRows, kThreads>(tile_q, rows_of(q, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    load_tile<D, kKeys, kThreads>(tile_k, keys, key);
    copy_commit();

    const unsigned row = threadIdx.x / 32 * 16 * kM, query = owner.first + row;
    unsigned row_starts[kM][2];
    load_starts(row_starts, starts, query, s.seq_len);
    const uint32_t lane_q = lane_of_a<D>(tile_q) + row * D * 2, lane_k = lane_of_b<D>(tile_k);
    const uint32_t lane_v = lane_of_a<D>(tile_v);
    Softmax<kM> softmax;
    float out[kM][D / 8][4] = {};
    for (; key < end; key += kKeys) {
      copy_wait<0>();
      __syncthreads();
      load_tile<D, kKeys, kThreads>(tile_v, values, key);
      copy_commit();
      float p[kM][kKeys / 8][4] = {};
      // Whole warps above the diagonal have nothing to add.
      const bool active = key < query + 16 * kM;
      if (active) add_product_of_rows<D>(p, lane_q, lane_k);
      copy_wait<0>();
      __syncthreads();
      if (key + kKeys < end) load_tile<D, kKeys, kThreads>(tile_k, keys, key + kKeys);
      copy_commit();
      if (active) {
        if (starts || key + kKeys > query + 1) mask(p, query, key, row_starts);
        softmax.step(p, out, s.scale);
        add_product<D>(out, p, lane_v);
      }
    }
    log_sum += statistics_at(s, owner.seq, owner.head);
    softmax.finish(out, s.scale, log_sum, query, s.seq_len);
    store_rows<D>(rows_of(o, s, owner.seq, owner.head, s.heads), owner.first, out, shared, row);
  }
};

// delta of the block's queries, into shared and global memory; dout's rows are in a tile.
template <int D, int kThreads>
__device__ __forceinline__ void row_products(float* here, float* delta, const char* tile,
                                             const HeadRows<const __nv_bfloat16>& o,
                                             unsigned first) {
  constexpr unsigned kLanes = D / 8;
  const unsigned chunk = threadIdx.x % kLanes;
  for (unsigned row = threadIdx.x / kLanes; row < kRows; row += kThreads / kLanes) {
    float a[kWide], b[kWide] = {};
    load(a, reinterpret_cast<const __nv_bfloat16*>(tile + chunk_at<D>(row, chunk)));
    if (first + row < o.rows && chunk * kWide < o.d) {
      const auto* from = o.first + (first + row) * o.stride + chunk * kWide;
      if (o.d % kWide == 0) {
        load(b, from);
      } else {
#pragma unroll
        for (unsigned i = 0; i < kWide; ++i) {
          if (chunk * kWide + i < o.d) b[i] = __bfloat162float(from[i]);
        }
      }
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += a[i] * b[i];
#pragma unroll
    for (unsigned offset = kLanes / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    if (chunk == 0) {
      here[row] = sum;
      if (first + row < o.rows) delta[first + row] = sum;
    }
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
  static constexpr unsigned kStatistics = 2 * kOwned + 4 * kStreamed;

  // A block owns queries.
  static __device__ __forceinline__ void queries(
      __nv_bfloat16* dq, float* delta, const __nv_bfloat16* dout, const __nv_bfloat16* q,
      const __nv_bfloat16* k, const __nv_bfloat16* v, const __nv_bfloat16* o, const float* log_sum,
      const unsigned* doc_starts, const Shape& s) {
    extern __shared__ __align__(1024) char shared[];
    float* statistics = reinterpret_cast<float*>(shared + kStatistics);
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
    };
    const unsigned* starts = starts_of(doc_starts, s, owner.seq);
    unsigned key = first_visible<kThreads>(starts, owner.first, s.seq_len,
                                           reinterpret_cast<unsigned*>(statistics)) /
                   kStream * kStream;
    const unsigned end = min(owner.first + kRows, s.seq_len);
    load_tile<D, kRows, kThreads>(tile_q, rows_of(q, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_dout, rows_of(dout, s, owner.seq, owner.head, s.heads),
                                  owner.first);
    fetch(key, 0);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    const size_t at = statistics_at(s, owner.seq, owner.head);
    row_products<D, kThreads>(statistics, delta + at, shared + kOwned,
                              rows_of(o, s, owner.seq, owner.head, s.heads), owner.first);
    __syncthreads();

    const unsigned row = threadIdx.x / 32 * 16 * kM, query = owner.first + row;
    float row_log_sum[kM][2], row_delta[kM][2];
    unsigned row_starts[kM][2];
    load_starts(row_starts, starts, query, s.seq_len);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned r = query + row_of(m, half);
        row_log_sum[m][half] = r < s.seq_len ? log_sum[at + r] : 0.0f;
        row_delta[m][half] = statistics[row + row_of(m, half)];
      }
    }
    float sum[kM][D / 8][4] = {};
    for (unsigned stage = 0; key < end; key += kStream, stage ^= 1) {
      copy_wait<0>();
      __syncthreads();
      if (key + kStream < end) fetch(key + kStream, stage ^ 1);
      copy_commit();
      // Whole warps above the diagonal have nothing to add.
      if (key >= query + 16 * kM) continue;
      const uint32_t tile_k = streamed + stage * 2 * kStreamed, tile_v = tile_k + kStreamed;
      float p[kM][kN][4] = {}, dp[kM][kN][4] = {};
      add_product_of_rows<D>(p, lane_of_a<D>(tile_q) + row * D * 2, lane_of_b<D>(tile_k));
      add_product_of_rows<D>(dp, lane_of_a<D>(tile_dout) + row * D * 2, lane_of_b<D>(tile_v));
      if (starts || key + kStream > query + 1) mask(p, query, key, row_starts);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float weight = exp2_approximate(p[m][n][j] * s.scale - row_log_sum[m][j / 2]);
            dp[m][n][j] = weight * (dp[m][n][j] - row_delta[m][j / 2]);
          }
        }
      }
      add_product<D>(sum, dp, lane_of_a<D>(tile_k));
    }
    scale_all(sum, s.scale * kLn2);
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
    const unsigned blocks = (end - owner.first + kStream - 1) / kStream;
    const auto fetch = [&](unsigned step, unsigned stage) {
      const unsigned head = owner.head * group + step / blocks;
      const unsigned query = owner.first + step % blocks * kStream;
      const uint32_t tile = streamed + stage * 2 * kStreamed;
      load_tile<D, kStream, kThreads>(tile, rows_of(q, s, owner.seq, head, s.heads), query);
      load_tile<D, kStream, kThreads>(tile + kStreamed,
                                      rows_of(dout, s, owner.seq, head, s.heads), query);
      const size_t at = statistics_at(s, owner.seq, head);
      load_statistics(shared_address(statistics + stage * 3 * kStream), log_sum + at, delta + at,
                      starts, query, s.seq_len);
    };
    load_tile<D, kRows, kThreads>(tile_k, rows_of(k, s, owner.seq, owner.head, s.kv_heads),
                                  owner.first);
    load_tile<D, kRows, kThreads>(tile_v, rows_of(v, s, owner.seq, owner.head, s.kv_heads),
                                  owner.first);
    fetch(0, 0);
    copy_commit();

    const unsigned row = threadIdx.x / 32 * 16 * kM, key = owner.first + row;
    float sum_k[kM][D / 8][4] = {}, sum_v[kM][D / 8][4] = {};
    for (unsigned step = 0; step < blocks * group; ++step) {
      copy_wait<0>();
      __syncthreads();
      if (step + 1 < blocks * group) fetch(step + 1, (step + 1) % 2);
      copy_commit();
      const unsigned query = owner.first + step % blocks * kStream;
      // Whole warps below the diagonal have nothing to add.
      if (query + kStream <= key) continue;
      const uint32_t tile_q = streamed + step % 2 * 2 * kStreamed, tile_dout = tile_q + kStreamed;
      const float* columns = statistics + step % 2 * 3 * kStream;
      float p[kM][kN][4] = {}, dp[kM][kN][4] = {};
      add_product_of_rows<D>(p, lane_of_a<D>(tile_k) + row * D * 2, lane_of_b<D>(tile_q));
      add_product_of_rows<D>(dp, lane_of_a<D>(tile_v) + row * D * 2, lane_of_b<D>(tile_dout));
      if (starts || query + 1 < key + 16 * kM) {
        mask_transposed(p, key, query, reinterpret_cast<const unsigned*>(columns) + 2 * kStream);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float log = columns[column_of(n, j)], delta = columns[kStream + column_of(n, j)];
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int i = j; i < 4; i += 2) {
              p[m][n][i] = exp2_approximate(p[m][n][i] * s.scale - log);
              dp[m][n][i] = p[m][n][i] * (dp[m][n][i] - delta);
            }
          }
        }
      }
      add_product<D>(sum_v, p, lane_of_a<D>(tile_dout));
      add_product<D>(sum_k, dp, lane_of_a<D>(tile_q));
    }
    scale_all(sum_k, s.scale * kLn2);
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

// One block for each 128 queries of each query head and sequence, with dynamic shared memory for
// 256 rows of D; seq_len >= 1, start_i <= i.
extern "C" __global__ void __launch_bounds__(Forward<64>::kThreads)
    flash_attention_forward_bf16_d64(
        __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
        const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
        const __nv_bfloat16* __restrict__ v, const unsigned* __restrict__ doc_starts,
        unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  Forward<64>::run(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
}

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

extern "C" __global__ void __launch_bounds__(Forward<128>::kThreads)
    flash_attention_forward_bf16_d128(
        __nv_bfloat16* __restrict__ o, float* __restrict__ log_sum,
        const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
        const __nv_bfloat16* __restrict__ v, const unsigned* __restrict__ doc_starts,
        unsigned seq_len, unsigned heads, unsigned kv_heads, unsigned d, float scale) {
  Forward<128>::run(o, log_sum, q, k, v, doc_starts, {seq_len, heads, kv_heads, d, scale});
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
