// The encoder of a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093): of each token the
// k largest of relu((x - c) W^T + b) and their latents, in ascending order of the latents; of
// equal values the lower latent. Gradients, with g = da where a > 0 and else 0:
// dW[i] = sum g (x_t - c) and db[i] = sum g over the pairs (t, j) with i_tj = i.
//
// x: [T, d] bf16; W, dW: [m, d] fp32; b, db: [m] fp32; c: [d] fp32; a, da, g: [T, k] fp32;
// indices: [T, k] u32. Everything is written (=) unless said. Saved: x, W, c, a, indices.
// The matrix product is x W'^T + b' with W' = W rounded to bf16 and b' = b - W' c, so that x is
// not rounded again. An eighth of the latents goes first: their pre-activations [tokens, m / 8]
// fp32 are read once, by a running selection in shared memory, whose k-th value is a threshold
// that a later value must exceed. The product with the rest keeps such values alone, in a list for
// each token; all of them never exist. Where a list overflows, or the selection is too small for
// lists, the pre-activations of all latents go the way of the first.
// Least traffic: 4 m d + 2 m d bytes for W', T m for the first pre-activations (8 T m without
// lists); 2 T k d + 4 m d bytes backward.

#include <cstdint>

#include "common/compact.cuh"
#include "common/gather.cuh"
#include "common/gemm_tile.cuh"
#include "common/radix_select.cuh"
#include "common/topk_lists.cuh"

namespace {

using gather::kColumns;
using gather::kMaxThreads;
using gather::kStage;

constexpr unsigned kThreads = radix_select::kThreads;
// Pre-activations of one round of a block.
constexpr unsigned kRound = 4 * kThreads;
// Rows of W that a warp rounds together, and latents that a block of the backward pass owns: the
// centre is read once for them.
constexpr unsigned kRowsPerWarp = 8;
constexpr unsigned kLatents = 4;

// Rounds rows of W, those of `latents`, and leaves <row, c> of each in `dots` of all lanes of a
// warp. Where c is 0 nothing is added, so that an infinite weight shows in the product alone.
template <int N>
__device__ __forceinline__ void narrow_rows(float (&dots)[kRowsPerWarp], __nv_bfloat16* narrow,
                                            const float* w,
                                            const unsigned (&latents)[kRowsPerWarp],
                                            unsigned rows, const float* c, unsigned d) {
  for (unsigned at = threadIdx.x % 32 * N; at < d; at += 32 * N) {
    float centre[N];
    load(centre, c + at);
#pragma unroll
    for (unsigned r = 0; r < kRowsPerWarp; ++r) {
      if (r >= rows) break;
      float row[N];
      load(row, w + size_t(latents[r]) * d + at);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        row[i] = __bfloat162float(__float2bfloat16_rn(row[i]));
        if (centre[i] != 0.0f) dots[r] += row[i] * centre[i];
      }
      store(narrow + size_t(r) * d + at, row);
    }
  }
#pragma unroll
  for (unsigned r = 0; r < kRowsPerWarp; ++r) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      dots[r] += __shfl_xor_sync(0xffffffffu, dots[r], offset);
    }
  }
}

// Keeps the k largest of the first n > k keys, in any order; a value that no later latent needs
// to exceed by less.
__device__ __forceinline__ float prune(uint64_t* keys, unsigned n, unsigned k, unsigned* kept,
                                       radix_select::Shared& shared) {
  const uint64_t limit =
      radix_select::nth<uint64_t, true>(n, k, shared, [=](unsigned i) { return keys[i]; });
  if (threadIdx.x == 0) *kept = 0;
  for (unsigned first = 0; first < n; first += kThreads) {
    const unsigned i = first + threadIdx.x;
    const uint64_t key = i < n ? keys[i] : 0;
    // What is kept moves only to places that have been read.
    __syncthreads();
    if (i < n && key >= limit) keys[atomicAdd(kept, 1u)] = key;
  }
  __syncthreads();
  return value_of(limit);
}

// Four pre-activations from `at` on; minus infinity beyond the last.
__device__ __forceinline__ void load_round(float (&v)[4], const float* row, unsigned at,
                                           unsigned m) {
  if (m % 4 == 0 && at < m) {
    load(v, row + at);
  } else {
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) v[i] = at + i < m ? row[at + i] : -INFINITY;
  }
}

}  // namespace

// W' [n, d] bf16 and b' [n]; row r is latent among[r], or r where `among` is null. One warp for
// eight rows.
extern "C" __global__ void __launch_bounds__(256)
    topk_prepare(__nv_bfloat16* __restrict__ narrow, float* __restrict__ shifted,
                 const float* __restrict__ w, const float* __restrict__ b,
                 const float* __restrict__ c, const unsigned* __restrict__ among, unsigned n,
                 unsigned m, unsigned d) {
  const unsigned first = (blockIdx.x * blockDim.x + threadIdx.x) / 32 * kRowsPerWarp;
  if (first >= n) return;
  const unsigned rows = min(kRowsPerWarp, n - first);
  unsigned latents[kRowsPerWarp];
  float dots[kRowsPerWarp] = {};
#pragma unroll
  for (unsigned r = 0; r < kRowsPerWarp; ++r) {
    const unsigned row = min(first + r, n - 1);
    latents[r] = among == nullptr ? row : min(among[row], m - 1);
  }
  narrow += size_t(first) * d;
  if (d % kColumns == 0) {
    narrow_rows<kColumns>(dots, narrow, w, latents, rows, c, d);
  } else {
    narrow_rows<1>(dots, narrow, w, latents, rows, c, d);
  }
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (unsigned r = 0; r < kRowsPerWarp; ++r) {
    if (lane == r && r < rows) shifted[first + r] = b[latents[r]] - dots[r];
  }
}

namespace {

// Offers a row's m pre-activations to the selection; the number of keys it ends with, at most k.
// A value that is NaN or +inf clears `finite`. `count` is the block's, 0 at first.
__device__ __forceinline__ unsigned select_row(uint64_t* keys, unsigned capacity,
                                               const float* row, unsigned m, unsigned k,
                                               unsigned& count, bool& finite,
                                               radix_select::Shared& shared) {
  float threshold = 0.0f;
  // At least as large as `count`, and the same for all threads.
  unsigned bound = 0;
  for (unsigned round = 0; round < m; round += kRound) {
    if (bound + kRound > capacity) {
      bound = count;
      __syncthreads();
      if (bound + kRound > capacity) {
        threshold = prune(keys, bound, k, &count, shared);
        bound = k;
      }
    }
    float v[4];
    const unsigned at = round + 4 * threadIdx.x;
    load_round(v, row, at, m);
    bool found = false;
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      // Written so that NaN passes.
      if (!(v[i] <= threshold)) {
        found = true;
        finite &= v[i] < INFINITY;
        keys[atomicAdd(&count, 1u)] = key_of(v[i], at + i);
      }
    }
    bound += 4 * __syncthreads_count(found);
  }
  const unsigned kept = count;
  __syncthreads();
  if (kept > k) prune(keys, kept, k, &count, shared);
  return min(kept, k);
}

// Writes a token's selection in ascending order of the latents. Where fewer than k values are
// above zero, the lowest other latents fill up with zeros: as long as they last, place p belongs
// to latent p.
__device__ __forceinline__ void write_selection(float* a, unsigned* indices,
                                                const uint64_t* keys, unsigned kept, unsigned k,
                                                const unsigned* among) {
  const unsigned zeros = k - kept;
  for (unsigned p = threadIdx.x; zeros > 0 && p < k; p += kThreads) {
    a[p] = 0.0f;
    indices[p] = among == nullptr ? p : among[p];
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kept; i += kThreads) {
    const unsigned latent = latent_of(keys[i]);
    unsigned lower = 0;
    for (unsigned other = 0; other < kept; ++other) lower += latent_of(keys[other]) < latent;
    const unsigned p = lower + min(zeros, latent - lower);
    a[p] = value_of(keys[i]);
    indices[p] = among == nullptr ? latent : among[latent];
  }
}

}  // namespace

// The selection of one token a block. products: [blocks, m] with b' added; a, indices: the rows
// of token `first` and on. bad: [1], the largest ~t of a token t with a value that is NaN or
// +inf (max=). Dynamic shared memory for `capacity` keys, at least k + kRound.
extern "C" __global__ void __launch_bounds__(kThreads)
    topk_select(float* __restrict__ a, unsigned* __restrict__ indices, unsigned* __restrict__ bad,
                const float* __restrict__ products, const unsigned* __restrict__ among,
                unsigned first, unsigned m, unsigned k, unsigned capacity) {
  extern __shared__ uint64_t keys[];
  __shared__ radix_select::Shared shared;
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  const size_t token = first + blockIdx.x;
  bool finite = true;
  const float* row = products + size_t(blockIdx.x) * m;
  const unsigned kept = select_row(keys, capacity, row, m, k, count, finite, shared);
  if (!finite) atomicMax(bad, ~unsigned(token));
  write_selection(a + token * k, indices + token * k, keys, kept, k, among);
}

// The same for the first m latents of each token, whose selection begins its list: lists
// [blocks, length] keys, counts [blocks], thresholds [blocks] fp32. `bad` as above.
extern "C" __global__ void __launch_bounds__(kThreads)
    topk_begin_lists(uint64_t* __restrict__ lists, unsigned* __restrict__ counts,
                     float* __restrict__ thresholds, unsigned* __restrict__ bad,
                     const float* __restrict__ products, unsigned first, unsigned m, unsigned k,
                     unsigned capacity, unsigned length) {
  extern __shared__ uint64_t keys[];
  __shared__ radix_select::Shared shared;
  __shared__ unsigned count, least;
  if (threadIdx.x == 0) count = 0, least = ~0u;
  __syncthreads();
  bool finite = true;
  const float* row = products + size_t(blockIdx.x) * m;
  const unsigned kept = select_row(keys, capacity, row, m, k, count, finite, shared);
  if (!finite) atomicMax(bad, ~(first + blockIdx.x));
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kept; i += kThreads) {
    lists[size_t(blockIdx.x) * length + i] = keys[i];
    atomicMin(&least, __float_as_uint(value_of(keys[i])));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = kept;
    thresholds[blockIdx.x] = kept == k ? __uint_as_float(least) : 0.0f;
  }
}

namespace {

using ListTile = Tile<128, 256, 64, 64, 3>;

}  // namespace

// One tile of x W'^T + b' a block, tokens in its rows and the latents from `first` on in its
// columns, for the lists. x: [tokens, d] bf16; w: [m, d] bf16; shifted: b' [m]; d is a multiple of 8.
extern "C" __global__ void __launch_bounds__(ListTile::kThreads)
    topk_extend_lists(uint64_t* __restrict__ lists, unsigned* __restrict__ counts,
                      const float* __restrict__ thresholds, const float* __restrict__ shifted,
                      unsigned tokens, unsigned first, unsigned m, unsigned d, unsigned length,
                      const __nv_bfloat16* __restrict__ x, const __nv_bfloat16* __restrict__ w) {
  using T = ListTile;
  using P = Product<T, Layout::kNt, true>;
  extern __shared__ __align__(128) unsigned char ring[];
  // Tiles of the same latents follow each other: they share W' in L2.
  const unsigned rows = (tokens + T::kM - 1) / T::kM;
  const unsigned row = blockIdx.x % rows * T::kM, col = first + blockIdx.x / rows * T::kN;
  const P none{{x, 0, 0, d}, {w, 0, 0, d}};
  const P full{{x, tokens, d, d}, {w, m, d, d}};
  typename P::Accumulator acc = {};
  accumulate<P, T>(acc, none, full, 0, (d + kStageK - 1) / kStageK, row, col,
                   shared_address(ring), [](typename P::Accumulator&) {});
  const Lists to{lists, counts, thresholds, shifted, tokens, m, length};
  to.extend<T>(acc, row, col);
}

// The selection from the list of one token a block; a, indices: the rows of token `first` and on.
// bad: [2]: the first as above, the second 1 where a list has not had room (max=), whose token
// is left out. Dynamic shared memory for `length` keys.
extern "C" __global__ void __launch_bounds__(kThreads)
    topk_finish_lists(float* __restrict__ a, unsigned* __restrict__ indices,
                      unsigned* __restrict__ bad, const uint64_t* __restrict__ lists,
                      const unsigned* __restrict__ counts, const unsigned* __restrict__ among,
                      unsigned first, unsigned k, unsigned length) {
  extern __shared__ uint64_t keys[];
  __shared__ radix_select::Shared shared;
  __shared__ unsigned kept;
  const size_t token = first + blockIdx.x;
  const unsigned count = counts[blockIdx.x];
  if (count > length) {
    if (threadIdx.x == 0) atomicMax(bad + 1, 1u);
    return;
  }
  bool finite = true;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    keys[i] = lists[size_t(blockIdx.x) * length + i];
    finite &= value_of(keys[i]) < INFINITY;
  }
  if (!finite) atomicMax(bad, ~unsigned(token));
  __syncthreads();
  if (count > k) prune(keys, count, k, &kept, shared);
  write_selection(a + token * k, indices + token * k, keys, min(count, k), k, among);
}

// g = da where a > 0, else 0. One thread a pair.
extern "C" __global__ void __launch_bounds__(256)
    topk_rectify(float* __restrict__ g, const float* __restrict__ da,
                 const float* __restrict__ a, unsigned n) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n) g[at] = a[at] > 0.0f ? da[at] : 0.0f;
}

namespace {

// dW and db of the latents from `first` up to `last`.
template <int N>
__device__ __forceinline__ void encoder_rows(float* dw, float* db, const float* g,
                                             const __nv_bfloat16* x, const float* c,
                                             const unsigned* offsets, const unsigned* pairs,
                                             unsigned first, unsigned last, unsigned k,
                                             unsigned d) {
  __shared__ gather::Stage stage;
  for (unsigned from = 0; from < d; from += blockDim.x * N) {
    const unsigned at = from + threadIdx.x * N;
    const bool mine = at < d;
    float centre[N] = {};
    if (mine) load(centre, c + at);
    for (unsigned latent = first; latent < last; ++latent) {
      const unsigned end = offsets[latent + 1];
      float sum[N] = {}, bias = 0.0f;
      for (unsigned begin = offsets[latent]; begin < end; begin += kStage) {
        const unsigned staged = min(kStage, end - begin);
        __syncthreads();
        if (threadIdx.x < staged) {
          const unsigned pair = pairs[begin + threadIdx.x];
          stage.row[threadIdx.x] = pair / k;
          stage.scale[threadIdx.x] = g[pair];
        }
        __syncthreads();
        if (mine) gather::add_rows(sum, stage, staged, x, centre, d, at);
        if (at == 0) {
          for (unsigned p = 0; p < staged; ++p) bias += stage.scale[p];
        }
      }
      if (mine) store(dw + size_t(latent) * d + at, sum);
      if (at == 0) db[latent] = bias;
    }
  }
}

}  // namespace

// One block for four latents; `offsets` [m + 1] and `pairs` as kernels/sparse_decode.cu sorts
// them.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    topk_backward(float* __restrict__ dw, float* __restrict__ db, const float* __restrict__ g,
                  const __nv_bfloat16* __restrict__ x, const float* __restrict__ c,
                  const unsigned* __restrict__ offsets, const unsigned* __restrict__ pairs,
                  unsigned m, unsigned k, unsigned d) {
  const unsigned first = blockIdx.x * kLatents, last = min(m, first + kLatents);
  if (d % kColumns == 0) {
    encoder_rows<kColumns>(dw, db, g, x, c, offsets, pairs, first, last, k, d);
  } else {
    encoder_rows<1>(dw, db, g, x, c, offsets, pairs, first, last, k, d);
  }
}

// counts [m]: += tokens, up to the largest number there is. One thread a latent.
extern "C" __global__ void __launch_bounds__(256)
    topk_age(unsigned* __restrict__ counts, unsigned m, unsigned tokens) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < m) counts[at] += min(tokens, ~counts[at]);
}

// counts [m]: 0 for every latent that is active in one of the n pairs. One thread a pair.
extern "C" __global__ void __launch_bounds__(256)
    topk_fire(unsigned* __restrict__ counts, const float* __restrict__ a,
              const unsigned* __restrict__ indices, unsigned n, unsigned m) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < n && a[at] > 0.0f && indices[at] < m) atomicExch(counts + indices[at], 0u);
}

// The latents whose count is above `limit`, ascending, and their number. One block.
extern "C" __global__ void __launch_bounds__(1024)
    topk_dead(unsigned* __restrict__ latents, unsigned* __restrict__ number,
              const unsigned* __restrict__ counts, unsigned m, unsigned limit) {
  __shared__ unsigned sums[32];
  const unsigned dead =
      compact(latents, m, sums, [=](unsigned i) { return counts[i] > limit; });
  if (threadIdx.x == 0) *number = dead;
}
