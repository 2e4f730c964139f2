// The encoder of a TopK sparse autoencoder (Gao et al. 2024, arXiv 2406.04093): of each token the
// k largest of relu((x - c) W^T + b) and their latents, in ascending order of the latents; of
// equal values the lower latent. Gradients, with g = da where a > 0 and else 0:
// dW[i] = sum g (x_t - c) and db[i] = sum g over the pairs (t, j) with i_tj = i.
//
// x: [T, d] bf16; W, dW: [m, d] fp32; b, db: [m] fp32; c: [d] fp32; a, da, g: [T, k] fp32;
// indices: [T, k] u32. Everything is written (=) unless said. Saved: x, W, c, a, indices.
// The matrix product is x W'^T + b' with W' = W rounded to bf16 and b' = b - W' c, so that x is
// not rounded again: made for a few hundred tokens at a time, whose pre-activations [tokens, m]
// fp32 are then read once, by a running selection in shared memory.
// Least traffic: 4 m d + 2 m d bytes for W', 8 T m for the pre-activations; 2 T k d + 4 m d bytes
// backward.

#include <cstdint>

#include "common/compact.cuh"
#include "common/gather.cuh"
#include "common/radix_select.cuh"

namespace {

using gather::kColumns;
using gather::kMaxThreads;
using gather::kStage;
using gather::Stage;

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

// Values above zero sort as their bits; of equal ones the lower latent is the larger key.
__device__ __forceinline__ uint64_t key_of(float value, unsigned latent) {
  return uint64_t(__float_as_uint(value)) << 32 | uint32_t(~latent);
}
__device__ __forceinline__ float value_of(uint64_t key) {
  return __uint_as_float(unsigned(key >> 32));
}
__device__ __forceinline__ unsigned latent_of(uint64_t key) { return ~unsigned(key); }

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
  const unsigned token = first + blockIdx.x;
  const float* row = products + size_t(blockIdx.x) * m;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  float threshold = 0.0f;
  bool finite = true;
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
  if (!finite) atomicMax(bad, ~token);
  unsigned kept = count;
  __syncthreads();
  if (kept > k) {
    prune(keys, kept, k, &count, shared);
    kept = k;
  }
  a += size_t(token) * k;
  indices += size_t(token) * k;
  // Where fewer than k values are above zero, the lowest other latents fill up with zeros: as
  // long as they last, place p belongs to latent p.
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
  __shared__ Stage stage;
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
