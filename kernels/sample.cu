// Draws a token from each row of logits: temperature, top-k, then top-p (nucleus sampling,
// Holtzman et al. 2020, arXiv 1904.09751), then the inverse of the distribution function.
//
// logits: [rows, V] fp32; words: [rows] u64, a random word each; ids: [rows] u32, written (=),
// kNone where no logit is above minus infinity. Logits that are NaN count as minus infinity.
// Saved: nothing.
//
// Token i weighs floor(2^39 2^-h_i), h_i = (max_j l_j - l_i) log2(e) / temperature. All sums are of
// integers: exact in any order, so that they may be made by atomic additions, and the same on the
// host, which computes h and the power with the same roundings (src/ops/sample/cpu.rs). Tokens are
// ordered by their logit, of equals the lower id first. Kept are the k first of them, then as few
// of these as weigh p of their sum; the token drawn is the first, in the order of ids, at which the
// sum of what is kept exceeds the random word's share (word / 2^64) of it all.
//
// A row is read by blocks of 4096 logits each: for its largest (sample_best); for counts and
// weights by bins of h, where top-k or top-p cut (sample_bins); for each block's weight and a list
// of the tokens in the bins where the cut may lie (sample_sums). The last step is one block's
// (sample_draw): it cuts the list by digits of 8 bits, finds the block where the sum is exceeded,
// and in it the token.
// Least traffic: 4 V bytes a row, once for the likeliest, twice for a draw, three times with a cut;
// after the first time from the L2 cache, where all rows fit. Beside it each block of sample_sums
// reads what was counted by bins, 4 KB. Memory: 8 V bytes a row for a list that may hold all.

#include <cstdint>

#include "common/pack.cuh"
#include "common/reduce.cuh"

namespace {

// As atomicAdd takes it.
using u64 = unsigned long long;

constexpr unsigned kThreads = 256;
constexpr unsigned kPerThread = 16;
constexpr unsigned kChunk = kThreads * kPerThread;
constexpr unsigned kNone = 0xffffffffu;
// Bins of an eighth of a halving, down to where the weight is 0.
constexpr float kBinsPerHalving = 8.0f;
constexpr unsigned kHalvings = 39;
constexpr unsigned kBins = kHalvings * unsigned(kBinsPerHalving);

// What is counted of a row.
struct State {
  // Sum of the weights, and number of the tokens, in each bin.
  u64 weights[kBins];
  unsigned counts[kBins];
  // Keys in its list.
  unsigned listed, unused;
};

struct Args {
  const float* logits;
  const u64* words;
  unsigned* ids;
  // [rows, chunks]: the largest key of each, and the weight of what is surely kept.
  u64* best;
  u64* sums;
  // [rows], and keys [rows, V] of which `listed` count; null where nothing is cut.
  State* states;
  u64* lists;
  unsigned vocab, chunks;
  // 0: no limit.
  unsigned top_k;
  float top_p;
  // log2(e) / temperature; 0: the likeliest.
  float scale;
  unsigned unused;
  u64 unused_words[6];
};

// The order of tokens: by logit, of equals the lower id has the larger key; 0 for a token that
// cannot be drawn.
__device__ __forceinline__ u64 key_of(float logit, unsigned id) {
  // Both zeros are +0 then.
  const unsigned bits = __float_as_uint(logit + 0.0f);
  const unsigned order = bits >> 31 ? ~bits : bits | 0x80000000u;
  return logit > -INFINITY ? u64(order) << 32 | ~id : 0;
}
__device__ __forceinline__ unsigned id_of(u64 key) { return ~unsigned(key); }
__device__ __forceinline__ float logit_of(u64 key) {
  const unsigned order = unsigned(key >> 32);
  return __uint_as_float(order >> 31 ? order ^ 0x80000000u : ~order);
}

// 2^x for x <= 0, rounded as exp2_of_negative of src/ops/math.rs is, whatever the compiler might
// fuse.
__device__ __forceinline__ float exp2_of_negative(float x) {
  constexpr float kRound = 12582912.0f;
  const float clamped = fmaxf(x, -126.0f);
  const float shifted = __fadd_rn(clamped, kRound);
  const int power = __float_as_int(shifted) - __float_as_int(kRound);
  const float r = __fmul_rn(__fsub_rn(clamped, __fsub_rn(shifted, kRound)), 0.693147180559945f);
  float p = 1.3926251e-3f;
  p = __fadd_rn(__fmul_rn(p, r), 8.363233e-3f);
  p = __fadd_rn(__fmul_rn(p, r), 4.1666552e-2f);
  p = __fadd_rn(__fmul_rn(p, r), 1.6666576e-1f);
  p = __fadd_rn(__fmul_rn(p, r), 0.5f);
  p = __fadd_rn(__fadd_rn(__fmul_rn(p, __fmul_rn(r, r)), r), 1.0f);
  const float y = __fmul_rn(p, __int_as_float((power + 127) << 23));
  return x < -126.0f ? 0.0f : y;
}

// Weights of a row's tokens.
struct Weigh {
  float max, scale;

  // How many halvings of the likeliest token's weight lead to this one's.
  __device__ __forceinline__ float halvings(float logit) const {
    // Also where both are infinite.
    return logit == max ? 0.0f : __fmul_rn(__fsub_rn(max, logit), scale);
  }
  // The logit is no NaN.
  __device__ __forceinline__ u64 weight(float halvings) const {
    return __float2ull_rz(__fmul_rn(exp2_of_negative(-halvings), 0x1p39f));
  }
  __device__ __forceinline__ u64 of(u64 key) const {
    return key == 0 ? 0 : weight(halvings(logit_of(key)));
  }
};

__device__ __forceinline__ unsigned bin_of(float halvings) {
  return min(unsigned(halvings * kBinsPerHalving), kBins - 1);
}

struct Found {
  unsigned index;
  // Sum of all before.
  u64 before;
};

struct Shared {
  u64 partial[kThreads / 32];
  u64 weights[kThreads];
  unsigned counts[kThreads];
  Found found;
  u64 key;
};

// The sum of at(i) over i < n, returned to all threads.
template <class At>
__device__ __forceinline__ u64 total(unsigned n, Shared& shared, const At& at) {
  u64 sum = 0;
  for (unsigned i = threadIdx.x; i < n; i += kThreads) sum += at(i);
  __syncthreads();
  return block_sum(sum, shared.partial);
}

// The first i < n at which the sum of at(0) .. at(i) exceeds `target`, or n; to all threads.
template <class At>
__device__ __forceinline__ Found find(unsigned n, u64 target, Shared& shared, const At& at) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u64 before = 0;
  for (unsigned first = 0; first < n; first += kThreads) {
    const unsigned i = first + threadIdx.x;
    const u64 own = i < n ? at(i) : 0;
    u64 sum = own;
#pragma unroll
    for (unsigned offset = 1; offset < 32; offset *= 2) {
      const u64 lower = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += lower;
    }
    __syncthreads();
    if (lane == 31) shared.partial[warp] = sum;
    __syncthreads();
    sum += before;
    for (unsigned w = 0; w < kThreads / 32; ++w) {
      if (w < warp) sum += shared.partial[w];
      before += shared.partial[w];
    }
    if (before > target) {
      if (sum > target && sum - own <= target) shared.found = {i, sum - own};
      __syncthreads();
      return shared.found;
    }
  }
  return {n, before};
}

// The least key of the fewest that, from the largest of n different keys down, weigh `wanted`,
// which is above 0 and not above what all weigh.
template <class Weight>
__device__ __forceinline__ u64 least_kept(const u64* keys, unsigned n, u64 wanted, Shared& shared,
                                          const Weight& weight) {
  u64 prefix = 0, mask = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    __syncthreads();
    shared.weights[threadIdx.x] = 0;
    shared.counts[threadIdx.x] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < n; i += kThreads) {
      const u64 key = keys[i];
      if ((key & mask) != prefix) continue;
      const unsigned digit = unsigned(key >> shift) & 255;
      atomicAdd(shared.weights + digit, weight(key));
      atomicAdd(shared.counts + digit, 1u);
    }
    __syncthreads();
    const auto downwards = [&](unsigned i) { return shared.weights[kThreads - 1 - i]; };
    const Found found = find(kThreads, wanted - 1, shared, downwards);
    const unsigned digit = kThreads - 1 - found.index;
    wanted -= found.before;
    prefix |= u64(digit) << shift;
    mask |= u64(255) << shift;
    if (shared.counts[digit] == 1) break;
  }
  // Of other tokens, which are not among the keys, some may have the digits found so far.
  for (unsigned i = threadIdx.x; i < n; i += kThreads) {
    if ((keys[i] & mask) == prefix) shared.key = keys[i];
  }
  __syncthreads();
  return shared.key;
}

// Calls use(logit, id) for the thread's share of a chunk.
template <class Use>
__device__ __forceinline__ void each(const float* row, unsigned chunk, unsigned vocab,
                                     const Use& use) {
  const unsigned first = chunk * kChunk;
  // Rows whose length is no multiple of 16 bytes are read value by value.
  const bool wide = vocab % kWideFloat == 0;
  const auto id = [=](unsigned i) {
    return first + (wide ? (i / kWideFloat * kThreads + threadIdx.x) * kWideFloat + i % kWideFloat
                         : i * kThreads + threadIdx.x);
  };
  float v[kPerThread / kWideFloat][kWideFloat];
#pragma unroll
  for (unsigned i = 0; i < kPerThread; i += kWideFloat) {
    if (wide && id(i) < vocab) load(v[i / kWideFloat], row + id(i));
#pragma unroll
    for (unsigned j = 0; j < kWideFloat; ++j) {
      if (!wide && id(i + j) < vocab) v[i / kWideFloat][j] = row[id(i + j)];
    }
  }
#pragma unroll
  for (unsigned i = 0; i < kPerThread; ++i) {
    if (id(i) < vocab) use(v[i / kWideFloat][i % kWideFloat], id(i));
  }
}

// The largest of the block's keys, returned to all threads.
__device__ __forceinline__ u64 block_max(u64 key, Shared& shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    key = max(key, __shfl_xor_sync(0xffffffffu, key, offset));
  }
  if (threadIdx.x % 32 == 0) shared.partial[threadIdx.x / 32] = key;
  __syncthreads();
  for (unsigned warp = 0; warp < kThreads / 32; ++warp) key = max(key, shared.partial[warp]);
  return key;
}

// The key of a row's likeliest token, 0 where there is none.
__device__ __forceinline__ u64 likeliest(const Args& a, unsigned row, Shared& shared) {
  u64 key = 0;
  for (unsigned i = threadIdx.x; i < a.chunks; i += kThreads) {
    key = max(key, a.best[size_t(row) * a.chunks + i]);
  }
  return block_max(key, shared);
}

// What the tokens that top-p keeps of some that weigh `weight` must weigh.
__device__ __forceinline__ u64 wanted(float top_p, u64 weight) {
  const u64 share = __double2ull_ru(__dmul_rn(__ull2double_rn(weight), double(top_p)));
  return max(1ull, min(weight, share));
}

// The bins where the cut may lie, to be listed; tokens of earlier bins are surely kept.
struct Range {
  // kBins where nothing is cut.
  unsigned first, last;
  // Whether there are more than top_k tokens.
  bool top_k;
};

__device__ __forceinline__ Range range(const Args& a, const State& state, Shared& shared) {
  const auto counts = [&](unsigned i) { return u64(state.counts[i]); };
  const auto weights = [&](unsigned i) { return state.weights[i]; };
  Range range = {kBins, kBins, false};
  if (a.top_k > 0) {
    range.first = range.last = find(kBins, a.top_k - 1, shared, counts).index;
    range.top_k = range.last < kBins;
  }
  if (a.top_p < 1.0f) {
    // What top-k keeps weighs at least so much.
    const u64 least = total(range.last, shared, weights);
    range.first = find(kBins, wanted(a.top_p, least) - 1, shared, weights).index;
    if (!range.top_k) range.last = range.first;
  }
  return range;
}

}  // namespace

// best: the largest key of each chunk; clears the states. One block a chunk.
extern "C" __global__ void __launch_bounds__(kThreads) sample_best(Args a) {
  __shared__ Shared shared;
  const unsigned row = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  u64 key = 0;
  each(a.logits + size_t(row) * a.vocab, chunk, a.vocab,
       [&](float logit, unsigned id) { key = max(key, key_of(logit, id)); });
  key = block_max(key, shared);
  if (threadIdx.x == 0) a.best[blockIdx.x] = key;
  if (a.states == nullptr || chunk > 0) return;
  auto* words = reinterpret_cast<unsigned*>(a.states + row);
  for (unsigned i = threadIdx.x; i < sizeof(State) / 4; i += kThreads) words[i] = 0;
}

// states: weights and counts by bin (+=). One block a chunk.
extern "C" __global__ void __launch_bounds__(kThreads) sample_bins(Args a) {
  __shared__ Shared shared;
  // A chunk's weights do not overflow two words of 20 bits of each, which shared memory adds
  // itself, unlike 64 bits.
  static_assert(kChunk <= 1u << 12 && kHalvings < 40, "sums that fit");
  constexpr unsigned kLowBits = 20;
  __shared__ unsigned counts[kBins], low[kBins], high[kBins];
  const unsigned row = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  for (unsigned i = threadIdx.x; i < kBins; i += kThreads) counts[i] = low[i] = high[i] = 0;
  const u64 best = likeliest(a, row, shared);
  const Weigh weigh = {logit_of(best), a.scale};
  if (best == 0) return;
  each(a.logits + size_t(row) * a.vocab, chunk, a.vocab, [&](float logit, unsigned) {
    if (!(logit > -INFINITY)) return;
    const float halvings = weigh.halvings(logit);
    const u64 weight = weigh.weight(halvings);
    if (weight == 0) return;
    const unsigned bin = bin_of(halvings);
    atomicAdd(counts + bin, 1u);
    atomicAdd(low + bin, unsigned(weight) & ((1u << kLowBits) - 1));
    if (weight >> kLowBits) atomicAdd(high + bin, unsigned(weight >> kLowBits));
  });
  __syncthreads();
  State& state = a.states[row];
  for (unsigned i = threadIdx.x; i < kBins; i += kThreads) {
    if (counts[i] == 0) continue;
    if (a.top_k > 0) atomicAdd(state.counts + i, counts[i]);
    if (a.top_p < 1.0f) atomicAdd(state.weights + i, (u64(high[i]) << kLowBits) + low[i]);
  }
}

// sums: the weight of what is surely kept of each chunk; lists and `listed` of the states: what may
// be. One block a chunk.
extern "C" __global__ void __launch_bounds__(kThreads) sample_sums(Args a) {
  __shared__ Shared shared;
  const unsigned row = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const u64 best = likeliest(a, row, shared);
  const Weigh weigh = {logit_of(best), a.scale};
  if (best == 0) return;
  Range cut = {kBins, kBins, false};
  if (a.states != nullptr) cut = range(a, a.states[row], shared);
  u64 sum = 0;
  each(a.logits + size_t(row) * a.vocab, chunk, a.vocab, [&](float logit, unsigned id) {
    if (!(logit > -INFINITY)) return;
    const float halvings = weigh.halvings(logit);
    const u64 weight = weigh.weight(halvings);
    if (weight == 0) return;
    const unsigned bin = bin_of(halvings);
    if (bin < cut.first) {
      sum += weight;
    } else if (bin <= cut.last) {
      const unsigned place = atomicAdd(&a.states[row].listed, 1u);
      a.lists[size_t(row) * a.vocab + place] = key_of(logit, id);
    }
  });
  __syncthreads();
  sum = block_sum(sum, shared.partial);
  if (threadIdx.x == 0) a.sums[blockIdx.x] = sum;
}

// ids; adds what is kept of the lists to `sums` (+=). One block a row.
extern "C" __global__ void __launch_bounds__(kThreads) sample_draw(Args a) {
  __shared__ Shared shared;
  const unsigned row = blockIdx.x;
  const u64 best = likeliest(a, row, shared);
  if (best == 0 || a.scale == 0.0f) {
    if (threadIdx.x == 0) a.ids[row] = best == 0 ? kNone : id_of(best);
    return;
  }
  const Weigh weigh = {logit_of(best), a.scale};
  const float* logits = a.logits + size_t(row) * a.vocab;
  u64* sums = a.sums + size_t(row) * a.chunks;
  u64 limit = 1;
  if (a.states != nullptr) {
    const State& state = a.states[row];
    const Range cut = range(a, state, shared);
    const u64* list = a.lists + size_t(row) * a.vocab;
    const unsigned listed = state.listed;
    const auto weight = [&](u64 key) { return weigh.of(key); };
    if (cut.top_k) {
      const auto counts = [&](unsigned i) { return u64(state.counts[i]); };
      const u64 rest = a.top_k - total(cut.first, shared, counts);
      limit = least_kept(list, listed, rest, shared, [](u64) { return 1ull; });
    }
    if (a.top_p < 1.0f) {
      const auto weights = [&](unsigned i) { return state.weights[i]; };
      const auto kept = [&](unsigned i) { return list[i] >= limit ? weigh.of(list[i]) : 0; };
      const u64 sure = total(cut.first, shared, weights);
      const u64 all = cut.top_k ? sure + total(listed, shared, kept)
                                : total(kBins, shared, weights);
      limit = least_kept(list, listed, wanted(a.top_p, all) - sure, shared, weight);
    }
    for (unsigned i = threadIdx.x; i < listed; i += kThreads) {
      if (list[i] >= limit) atomicAdd(sums + id_of(list[i]) / kChunk, weigh.of(list[i]));
    }
    __syncthreads();
  }
  const auto weights = [&](unsigned i) { return sums[i]; };
  const u64 target = __umul64hi(a.words[row], total(a.chunks, shared, weights));
  const Found chunk = find(a.chunks, target, shared, weights);
  const unsigned first = chunk.index * kChunk;
  const auto kept = [&](unsigned i) {
    const u64 key = key_of(logits[first + i], first + i);
    return key >= limit ? weigh.of(key) : 0;
  };
  const Found token =
      find(min(kChunk, a.vocab - first), target - chunk.before, shared, kept);
  if (threadIdx.x == 0) a.ids[row] = first + token.index;
}
