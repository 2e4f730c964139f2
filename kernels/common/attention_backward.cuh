// What the kernels of attention's backward pass share: their arguments, the statistics of queries
// that both passes read, and the way gradients of keys and values are stored.
#pragma once

#include "attention.cuh"

// As `BackwardArgs` in src/ops/flash_attention/backward.rs.
struct BackwardArgs {
  __nv_bfloat16 *dq, *dk, *dv;
  // [parts, 2, T, kv_heads d] where several blocks share the keys of a key/value head: sums of dk,
  // then of dv, over the heads of each.
  float* partial;
  const __nv_bfloat16 *dout, *q, *k, *v, *o;
  const float* log_sum;
  // [batch, heads, ceil(seq_len / kSpan), 3, kSpan]: log_sum, delta and document start of each
  // query; zeros beyond the sequence.
  float* statistics;
  const unsigned* doc_starts;
  unsigned seq_len, heads, kv_heads, d;
  float scale;
  // How many blocks share the heads that read a key/value head, a divisor of their number, and how
  // many of the grid's blocks, the first ones, own keys. The others own queries.
  unsigned parts, key_blocks, unused;
};
static_assert(sizeof(BackwardArgs) == 128);

__device__ __forceinline__ Shape shape_of(const BackwardArgs& args) {
  return {args.seq_len, args.heads, args.kv_heads, args.d, args.scale};
}

constexpr float kLn2 = 0.6931471805599453f;

// Queries whose statistics lie together.
constexpr unsigned kSpan = 64;

// Position of the statistics of one head's queries.
__device__ __forceinline__ size_t spans_at(const Shape& s, unsigned seq, unsigned head) {
  return (size_t(seq) * s.heads + head) * ((s.seq_len + kSpan - 1) / kSpan) * 3 * kSpan;
}

// log_sum and delta of a warp's 16 M queries.
template <int M>
__device__ __forceinline__ void row_statistics(float (&log_sum)[M][2], float (&delta)[M][2],
                                               const float* statistics, unsigned query,
                                               unsigned rows) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = query + row_of(m, half);
      const float* at = statistics + row / kSpan * 3 * kSpan + row % kSpan;
      log_sum[m][half] = row < rows ? at[0] : 0.0f;
      delta[m][half] = row < rows ? at[kSpan] : 0.0f;
    }
  }
}

// What a block owns of the pass over keys: rows of one key/value head, and which of the query heads
// that read it.
struct KeyOwner {
  unsigned first, kv_head, seq, part, head, heads;

  __device__ __forceinline__ explicit KeyOwner(const BackwardArgs& args) {
    const Shape s = shape_of(args);
    const Owner owner(s, args.kv_heads * args.parts, false, blockIdx.x, args.key_blocks);
    first = owner.first, seq = owner.seq;
    kv_head = owner.head / args.parts, part = owner.head % args.parts;
    heads = args.heads / args.kv_heads / args.parts;
    head = owner.head * heads;
  }
};

// The end of the queries that see a key before `end`, from `first` on. `last` is a word for each
// warp.
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

// As `mask` where rows are keys and columns are queries, with a start for each column.
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

// Writes the warp's 16 M rows to rows first + row.. of a head. Quads write whole sectors.
template <int D, int M>
__device__ __forceinline__ void store_sums(const HeadRows<float>& to, unsigned first,
                                           const float (&c)[M][D / 8][4], unsigned row) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned r = first + row + row_of(m, half);
      if (r >= to.rows) continue;
      float* at = to.first + r * to.stride + column_of(0, 0);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        if (n * 8 < to.d) {
          *reinterpret_cast<float2*>(at + n * 8) =
              make_float2(c[m][n][2 * half], c[m][n][2 * half + 1]);
        }
      }
    }
  }
}

// Writes dk and dv of a warp's 16 M keys: the gradients, by way of rows `row`.. of two tiles that no
// other warp uses, or this block's part of their sums.
template <int D, int M>
__device__ __forceinline__ void store_keys(const BackwardArgs& args, const KeyOwner& owner,
                                           float (&sum_k)[M][D / 8][4],
                                           const float (&sum_v)[M][D / 8][4], char* tile_k,
                                           char* tile_v, unsigned row) {
  const Shape s = shape_of(args);
  each(sum_k, [&](float& c, int, int, int) { c *= s.scale * kLn2; });
  if (args.parts == 1) {
    store_rows<D>(rows_of(args.dk, s, owner.seq, owner.kv_head, s.kv_heads), owner.first, sum_k,
                  tile_k, row);
    store_rows<D>(rows_of(args.dv, s, owner.seq, owner.kv_head, s.kv_heads), owner.first, sum_v,
                  tile_v, row);
    return;
  }
  // One more sequence is one sequence's values further on.
  const unsigned batch = args.key_blocks / ((s.seq_len + kRows - 1) / kRows) / s.kv_heads /
                         args.parts;
  const unsigned at = owner.part * 2 * batch + owner.seq;
  store_sums<D>(rows_of(args.partial, s, at, owner.kv_head, s.kv_heads), owner.first, sum_k, row);
  store_sums<D>(rows_of(args.partial, s, at + batch, owner.kv_head, s.kv_heads), owner.first,
                sum_v, row);
}
