// The decoder of a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093):
// out_t = sum_j a_tj W[i_tj] + b, and its gradients da_tj = <g_t, W[i_tj]>,
// dW[i] = sum a_tj g_t over the pairs (t, j) with i_tj = i, db = sum_t g_t.
//
// a, da: [T, k] fp32; indices: [T, k] u32; W, dW: [m, d] fp32, the trained master itself: a copy
// in bf16 would halve the gather but costs a pass over W for every step; b, db: [d] fp32; out:
// [T, d] fp32 or bf16; g: [T, d] bf16. Everything is written (=). Saved: a, W. The pairs of a
// latent are found by a stable radix sort (8 bits a pass) of the indices, and each latent has one
// block that adds them up in ascending order. An index of m or more counts as no pair.
// Least traffic: 4 T k d bytes forward, 2 T k d + 8 m d bytes backward (4 T k d where W is
// frozen).

#include "common/gather.cuh"
#include "common/reduce.cuh"

namespace {

using gather::kColumns;
using gather::kMaxThreads;
using gather::kStage;
using gather::Partial;
using gather::Stage;

template <int N, class Out>
__device__ __forceinline__ void decode(Out* out, const float* acts, const unsigned* indices,
                                       const float* w, const float* bias, unsigned k, unsigned m,
                                       unsigned d) {
  __shared__ Stage stage;
  const float centre[N] = {};
  for (unsigned from = 0; from < d; from += blockDim.x * N) {
    const unsigned at = from + threadIdx.x * N;
    const bool mine = at < d;
    float sum[N] = {};
    if (mine && bias != nullptr) load(sum, bias + at);
    for (unsigned first = 0; first < k; first += kStage) {
      const unsigned pairs = min(kStage, k - first);
      __syncthreads();
      if (threadIdx.x < pairs) {
        const unsigned index = indices[first + threadIdx.x];
        stage.row[threadIdx.x] = index < m ? index : 0;
        stage.scale[threadIdx.x] = index < m ? acts[first + threadIdx.x] : 0.0f;
      }
      __syncthreads();
      if (mine) gather::add_rows(sum, stage, pairs, w, centre, d, at);
    }
    if (mine) store(out + at, sum);
  }
}

template <class Out>
__device__ __forceinline__ void decode_token(Out* out, const float* acts,
                                             const unsigned* indices, const float* w,
                                             const float* bias, unsigned k, unsigned m,
                                             unsigned d) {
  out += size_t(blockIdx.x) * d;
  acts += size_t(blockIdx.x) * k;
  indices += size_t(blockIdx.x) * k;
  if (d % kColumns == 0) {
    decode<kColumns>(out, acts, indices, w, bias, k, m, d);
  } else {
    decode<1>(out, acts, indices, w, bias, k, m, d);
  }
}

// The gradients of one latent: dW and the da of its pairs.
template <int N>
__device__ __forceinline__ void by_latent(float* da, float* dw, const __nv_bfloat16* g,
                                          const float* acts, const float* w,
                                          const unsigned* pairs, unsigned count, unsigned k,
                                          unsigned d) {
  __shared__ Stage stage;
  __shared__ Partial partial;
  for (unsigned from = 0; from < d; from += blockDim.x * N) {
    const unsigned at = from + threadIdx.x * N;
    const bool mine = at < d;
    float own[N] = {}, sum[N] = {};
    if (mine && count > 0) load(own, w + at);
    for (unsigned first = 0; first < count; first += kStage) {
      const unsigned staged = min(kStage, count - first);
      unsigned pair = 0;
      __syncthreads();
      if (threadIdx.x < staged) {
        pair = pairs[first + threadIdx.x];
        stage.row[threadIdx.x] = pair / k;
        stage.scale[threadIdx.x] = acts[pair];
      }
      __syncthreads();
      gather::add_and_dot(sum, partial, own, stage, staged, g, d, at, mine);
      __syncthreads();
      if (threadIdx.x < staged) {
        const float dot = gather::total(partial, threadIdx.x);
        da[pair] = from == 0 ? dot : da[pair] + dot;
      }
    }
    if (mine) store(dw + at, sum);
  }
}

// The da of one token alone.
template <int N>
__device__ __forceinline__ void by_token(float* da, const __nv_bfloat16* g,
                                         const unsigned* indices, const float* w, unsigned k,
                                         unsigned m, unsigned d) {
  __shared__ Stage stage;
  __shared__ Partial partial;
  for (unsigned from = 0; from < d; from += blockDim.x * N) {
    const unsigned at = from + threadIdx.x * N;
    const bool mine = at < d;
    float own[N] = {}, unused[N] = {};
    if (mine) load(own, g + at);
    for (unsigned first = 0; first < k; first += kStage) {
      const unsigned staged = min(kStage, k - first);
      bool counts = false;
      __syncthreads();
      if (threadIdx.x < staged) {
        const unsigned index = indices[first + threadIdx.x];
        counts = index < m;
        stage.row[threadIdx.x] = counts ? index : 0;
        stage.scale[threadIdx.x] = 0.0f;
      }
      __syncthreads();
      gather::add_and_dot(unused, partial, own, stage, staged, w, d, at, mine);
      __syncthreads();
      if (threadIdx.x < staged) {
        const float dot = counts ? gather::total(partial, threadIdx.x) : 0.0f;
        da[first + threadIdx.x] = from == 0 ? dot : da[first + threadIdx.x] + dot;
      }
    }
  }
}

// Rows of one partial sum.
constexpr unsigned kRows = 64;

template <int N, class T>
__device__ __forceinline__ void sum_rows(float* out, const T* matrix, const float* weights,
                                         unsigned rows, unsigned d) {
  const unsigned first = blockIdx.x * kRows;
  const unsigned last = min(rows, first + kRows);
  out += size_t(blockIdx.x) * d;
  for (unsigned at = threadIdx.x * N; at < d; at += blockDim.x * N) {
    float sum[N] = {};
#pragma unroll 4
    for (unsigned r = first; r < last; ++r) {
      float row[N];
      load(row, matrix + size_t(r) * d + at);
      const float weight = weights == nullptr ? 1.0f : weights[r];
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += weight * row[i];
    }
    store(out + at, sum);
  }
}

constexpr unsigned kSortThreads = 256;
constexpr unsigned kSortWarps = kSortThreads / 32;
constexpr unsigned kDigits = 256;
// Keys of a warp, in rounds of 32.
constexpr unsigned kWarpKeys = 256;

// A key's digit; kDigits beyond the last key. Keys of `limit` and more are taken for `limit`.
__device__ __forceinline__ unsigned digit_of(const unsigned* keys, unsigned at, unsigned count,
                                             unsigned limit, unsigned shift, unsigned* key) {
  if (at >= count) return kDigits;
  *key = min(keys[at], limit);
  return *key >> shift & (kDigits - 1);
}

}  // namespace

// One block a token.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sparse_decode_forward_f32(float* __restrict__ out, const float* __restrict__ acts,
                              const unsigned* __restrict__ indices, const float* __restrict__ w,
                              const float* __restrict__ bias, unsigned k, unsigned m,
                              unsigned d) {
  decode_token(out, acts, indices, w, bias, k, m, d);
}

// One block a token.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sparse_decode_forward_bf16(__nv_bfloat16* __restrict__ out, const float* __restrict__ acts,
                               const unsigned* __restrict__ indices, const float* __restrict__ w,
                               const float* __restrict__ bias, unsigned k, unsigned m,
                               unsigned d) {
  decode_token(out, acts, indices, w, bias, k, m, d);
}

// One block a latent; `offsets` [m + 1] and `pairs` are the sorted pairs.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sparse_decode_backward(float* __restrict__ da, float* __restrict__ dw,
                           const __nv_bfloat16* __restrict__ g, const float* __restrict__ acts,
                           const float* __restrict__ w, const unsigned* __restrict__ offsets,
                           const unsigned* __restrict__ pairs, unsigned k, unsigned d) {
  const unsigned first = offsets[blockIdx.x];
  const unsigned count = offsets[blockIdx.x + 1] - first;
  const size_t row = size_t(blockIdx.x) * d;
  if (d % kColumns == 0) {
    by_latent<kColumns>(da, dw + row, g, acts, w + row, pairs + first, count, k, d);
  } else {
    by_latent<1>(da, dw + row, g, acts, w + row, pairs + first, count, k, d);
  }
}

// One block a token.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sparse_decode_backward_acts(float* __restrict__ da, const __nv_bfloat16* __restrict__ g,
                                const unsigned* __restrict__ indices,
                                const float* __restrict__ w, unsigned k, unsigned m, unsigned d) {
  const size_t token = blockIdx.x;
  if (d % kColumns == 0) {
    by_token<kColumns>(da + token * k, g + token * d, indices + token * k, w, k, m, d);
  } else {
    by_token<1>(da + token * k, g + token * d, indices + token * k, w, k, m, d);
  }
}

// Sums of 64 rows each, weighted where `weights` [rows] is not null: partial [blocks, d].
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    row_sum_partial_bf16(float* __restrict__ partial, const __nv_bfloat16* __restrict__ matrix,
                         const float* __restrict__ weights, unsigned rows, unsigned d) {
  if (d % kColumns == 0) {
    sum_rows<kColumns>(partial, matrix, weights, rows, d);
  } else {
    sum_rows<1>(partial, matrix, weights, rows, d);
  }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    row_sum_partial_f32(float* __restrict__ partial, const float* __restrict__ matrix,
                        const float* __restrict__ weights, unsigned rows, unsigned d) {
  if (d % kColumns == 0) {
    sum_rows<kColumns>(partial, matrix, weights, rows, d);
  } else {
    sum_rows<1>(partial, matrix, weights, rows, d);
  }
}

// out = the sum of the partial sums, in fp64, divided by `divisor`. One thread a column.
extern "C" __global__ void __launch_bounds__(256)
    row_sum_total(float* __restrict__ out, const float* __restrict__ partial, unsigned parts,
                  unsigned d, float divisor) {
  const unsigned column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= d) return;
  double sum = 0.0;
#pragma unroll 8
  for (unsigned part = 0; part < parts; ++part) sum += partial[size_t(part) * d + column];
  out[column] = float(sum / divisor);
}

// How often each digit occurs among a block's 2048 keys: counts [256, blocks].
extern "C" __global__ void __launch_bounds__(kSortThreads)
    group_count(unsigned* __restrict__ counts, const unsigned* __restrict__ keys, unsigned count,
                unsigned limit, unsigned shift) {
  __shared__ unsigned histogram[kDigits + 1];
  histogram[threadIdx.x] = 0;
  if (threadIdx.x == 0) histogram[kDigits] = 0;
  __syncthreads();
  const unsigned first = blockIdx.x * kSortWarps * kWarpKeys;
  for (unsigned i = threadIdx.x; i < kSortWarps * kWarpKeys; i += kSortThreads) {
    unsigned key;
    atomicAdd(histogram + digit_of(keys, first + i, count, limit, shift, &key), 1u);
  }
  __syncthreads();
  counts[threadIdx.x * gridDim.x + blockIdx.x] = histogram[threadIdx.x];
}

// Turns counts [n] into the sums of those before each. One block.
extern "C" __global__ void __launch_bounds__(1024)
    group_scan(unsigned* __restrict__ counts, unsigned n) {
  __shared__ unsigned sums[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  unsigned before = 0;
  for (unsigned first = 0; first < n; first += 1024) {
    const unsigned at = first + threadIdx.x;
    const unsigned own = at < n ? counts[at] : 0;
    unsigned sum = own;
#pragma unroll
    for (unsigned offset = 1; offset < 32; offset *= 2) {
      const unsigned lower = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += lower;
    }
    if (lane == 31) sums[warp] = sum;
    __syncthreads();
    unsigned all = 0;
    for (unsigned w = 0; w < 32; ++w) {
      if (w == warp) sum += all;
      all += sums[w];
    }
    if (at < n) counts[at] = before + sum - own;
    before += all;
    __syncthreads();
  }
}

// One pass of the sort: keys and the pairs they belong to (0, 1, 2, ... where null) in the order
// of one digit, equal digits in the order they were in. `starts` [256, blocks] are the scanned
// counts.
extern "C" __global__ void __launch_bounds__(kSortThreads)
    group_scatter(unsigned* __restrict__ keys_out, unsigned* __restrict__ pairs_out,
                  const unsigned* __restrict__ keys, const unsigned* __restrict__ pairs,
                  const unsigned* __restrict__ starts, unsigned count, unsigned limit,
                  unsigned shift) {
  __shared__ unsigned next[kSortWarps][kDigits + 1];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned first = (blockIdx.x * kSortWarps + warp) * kWarpKeys + lane;
  for (unsigned i = lane; i <= kDigits; i += 32) next[warp][i] = 0;
  __syncwarp();
  unsigned key = 0;
  for (unsigned i = 0; i < kWarpKeys; i += 32) {
    atomicAdd(&next[warp][digit_of(keys, first + i, count, limit, shift, &key)], 1u);
  }
  __syncthreads();
  // Thread t knows where digit t begins, for each warp in turn.
  unsigned start = starts[threadIdx.x * gridDim.x + blockIdx.x];
  for (unsigned w = 0; w < kSortWarps; ++w) {
    const unsigned own = next[w][threadIdx.x];
    next[w][threadIdx.x] = start;
    start += own;
  }
  __syncthreads();
  for (unsigned i = 0; i < kWarpKeys; i += 32) {
    const unsigned digit = digit_of(keys, first + i, count, limit, shift, &key);
    const unsigned peers = __match_any_sync(0xffffffffu, digit);
    const unsigned rank = __popc(peers & ((1u << lane) - 1));
    const unsigned at = next[warp][digit] + rank;
    __syncwarp();
    if (rank == 0) next[warp][digit] += __popc(peers);
    __syncwarp();
    if (digit < kDigits) {
      keys_out[at] = key;
      pairs_out[at] = pairs == nullptr ? first + i : pairs[first + i];
    }
  }
}

// offsets[i], for i up to m: where key i or the next larger one begins among the sorted keys.
extern "C" __global__ void __launch_bounds__(256)
    group_offsets(unsigned* __restrict__ offsets, const unsigned* __restrict__ keys,
                  unsigned count, unsigned m) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at > count) return;
  const unsigned from = at == 0 ? 0 : keys[at - 1] + 1;
  const unsigned to = at == count ? m : keys[at];
  for (unsigned i = from; i <= to; ++i) offsets[i] = at;
}

namespace {

template <int N>
__device__ __forceinline__ void normalize(float* row, unsigned d, float epsilon) {
  __shared__ float partial[kMaxThreads / 32];
  const unsigned step = blockDim.x * N, start = threadIdx.x * N;
  // What one round of the block covers stays in registers.
  float own[N] = {}, sum = 0.0f;
  if (start < d) load(own, row + start);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += own[i] * own[i];
  for (unsigned at = start + step; at < d; at += step) {
    float v[N];
    load(v, row + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += v[i] * v[i];
  }
  const float divisor = sqrtf(block_sum(sum, partial)) + epsilon;
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] /= divisor;
  if (start < d) store(row + start, own);
  for (unsigned at = start + step; at < d; at += step) {
    float v[N];
    load(v, row + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] /= divisor;
    store(row + at, v);
  }
}

}  // namespace

// Divides each row of W [m, d] by its norm + epsilon, in place. One block a row; a row is read
// once up to d = 2048.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    sparse_decode_normalize(float* __restrict__ w, unsigned d, float epsilon) {
  w += size_t(blockIdx.x) * d;
  if (d % kColumns == 0) {
    normalize<kColumns>(w, d, epsilon);
  } else {
    normalize<1>(w, d, epsilon);
  }
}
