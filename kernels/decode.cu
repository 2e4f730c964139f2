// One new token for each of a few sequences: linear maps of few rows, attention over a key/value
// cache. Nothing is saved, nothing is differentiated.
//
// decode_linear: y = alpha x W^T + b (or added to y, +=); x: [batch, in] bf16, W: [out, in] bf16,
// b: [out] bf16 or null, y: [batch, out] bf16 or fp32. Up to three maps of one x in a launch. A
// block owns 16 rows of W and its warps take turns with 32 columns: each lane loads 16 bytes of two
// rows, which are the left operand of mma as they come, since the order of the summands is free as
// long as x is taken in the same. Sums are fp32, those of the warps added up in their order; a row of y
// depends on its own row of x alone, bit for bit. W is read once for up to 32 rows of x.
// Least traffic: 2 in out bytes (x and y are small beside it); 2 batch in out FLOP.
//
// decode_append and decode_attend: for query head h at position p of its sequence, o_h =
// softmax(s q_h K_g^T) V_g with g = h / (heads / kv_heads), s = 1 / sqrt(d), over the keys and
// values of positions 0..p, q and the key at p rotated as in rope.cu. q, o: [batch, heads, d], new
// k, v: [batch, kv_heads, d], all bf16, d a multiple of 8 up to 128; softmax fp32. A block owns 128 keys
// of one sequence and key/value head and up to 8 of the queries that share it; the parts of a
// sequence are put together in their order (decode_combine), with the log-sum-exp weights of
// FlashAttention's split (Dao et al., "Flash-Decoding", 2023). Which parts there are depends on the
// sequence's own length alone. Least traffic: 4 (p + 1) kv_heads d bytes a sequence.

#include "common/mma.cuh"
#include "common/pack.cuh"

namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256, kWarps = kThreads / 32, kMaps = 3;
// Columns that a warp takes at a time: 8 for each lane of a quad.
constexpr unsigned kColumns = 4 * kWide;
// Distance of two columns of a warp's sums, so that no two lanes meet in a bank.
constexpr int kPadded = kMmaM + 4;

constexpr unsigned kOutFloat = 1, kAdd = 2;

struct Map {
  const bf16* weight;
  const bf16* bias;
  void* y;
  // Rows of the weight, and the first block that works on it.
  unsigned out, first;
};

struct LinearArgs {
  const bf16* x;
  unsigned batch, in, flags;
  float alpha;
  Map maps[kMaps];
  uint64_t unused;
};

// Values at .. at + 7 of a row of n, zeros beyond its end.
template <bool kAligned>
__device__ __forceinline__ uint4 eight(const bf16* row, unsigned at, unsigned n) {
  if constexpr (kAligned) {
    return at < n ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
  } else {
    const auto* bits = reinterpret_cast<const unsigned short*>(row);
    uint32_t words[4];
#pragma unroll
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned low = at + 2 * i < n ? bits[at + 2 * i] : 0u;
      const unsigned high = at + 2 * i + 1 < n ? bits[at + 2 * i + 1] : 0u;
      words[i] = low | high << 16;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// 8 N rows of x at a time.
template <int N>
struct Linear {
  // Sums of each warp: [warp][row of x][row of W].
  using Partial = float[kWarps][kMmaN * N][kPadded];

  template <bool kAligned>
  static __device__ __forceinline__ void sums(float (&acc)[N][4], const LinearArgs& a,
                                              const bf16* low, const bf16* high, unsigned first) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 4
    for (unsigned base = warp * kColumns; base < a.in; base += kWarps * kColumns) {
      const unsigned at = base + lane % 4 * kWide;
      const uint4 w0 = eight<kAligned>(low, at, a.in), w1 = eight<kAligned>(high, at, a.in);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const unsigned row = first + n * kMmaN + lane / 4;
        uint4 x = {};
        if (row < a.batch) x = eight<kAligned>(a.x + size_t(row) * a.in, at, a.in);
        const uint32_t front[4] = {w0.x, w1.x, w0.y, w1.y}, back[4] = {w0.z, w1.z, w0.w, w1.w};
        mma_bf16(acc[n], front, x.x, x.y);
        mma_bf16(acc[n], back, x.z, x.w);
      }
    }
  }

  static __device__ __forceinline__ void run(const LinearArgs& a) {
    __shared__ Partial partial;
    Map map = a.maps[0];
#pragma unroll
    for (int i = 1; i < kMaps; ++i) {
      if (blockIdx.x >= a.maps[i].first) map = a.maps[i];
    }
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const unsigned own = (blockIdx.x - map.first) * kMmaM;
    // Rows beyond the last are the last again; nobody writes their results.
    const unsigned r0 = min(own + lane / 4, map.out - 1), r1 = min(own + lane / 4 + 8, map.out - 1);
    const bf16 *low = map.weight + size_t(r0) * a.in, *high = map.weight + size_t(r1) * a.in;
    for (unsigned first = 0; first < a.batch; first += kMmaN * N) {
      float acc[N][4] = {};
      if (a.in % kWide == 0) {
        sums<true>(acc, a, low, high, first);
      } else {
        sums<false>(acc, a, low, high, first);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          partial[warp][n * kMmaN + lane % 4 * 2 + i % 2][lane / 4 + i / 2 * 8] = acc[n][i];
        }
      }
      __syncthreads();
      for (unsigned i = threadIdx.x; i < kMmaM * kMmaN * N; i += kThreads) {
        // The halves of a warp take rows of x four apart, whose sums lie in other banks.
        const unsigned n = i / kMmaM, column = n / kMmaN * kMmaN + n % 2 * 4 + n % kMmaN / 2;
        const unsigned row = own + i % kMmaM, x_row = first + column;
        if (row >= map.out || x_row >= a.batch) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += partial[w][column][i % kMmaM];
        sum *= a.alpha;
        if (map.bias) sum += __bfloat162float(map.bias[row]);
        const size_t at = size_t(x_row) * map.out + row;
        auto* floats = static_cast<float*>(map.y);
        auto* halves = static_cast<bf16*>(map.y);
        if (a.flags & kAdd) sum += a.flags & kOutFloat ? floats[at] : __bfloat162float(halves[at]);
        if (a.flags & kOutFloat) {
          floats[at] = sum;
        } else {
          halves[at] = __float2bfloat16_rn(sum);
        }
      }
      __syncthreads();
    }
  }
};

// What the host tells of a sequence.
struct Sequence {
  // [layers, 2, capacity, kv_heads d], keys before values.
  uint64_t cache;
  unsigned capacity;
  // Of the new token; as many tokens are in the cache before it.
  unsigned position;

  // Row 0 of the keys (side 0) or values (side 1) of a layer.
  __device__ __forceinline__ bf16* rows(unsigned layer, unsigned side, unsigned width) const {
    return reinterpret_cast<bf16*>(cache) + (size_t(layer) * 2 + side) * capacity * width;
  }
};

struct Heads {
  unsigned queries, kv, d;
};

// Keys of a block, queries that it has in registers, its threads.
constexpr unsigned kSplit = 128;
constexpr int kQueries = 8, kAttendThreads = 128;
// Keys that a lane has under way.
constexpr int kAhead = 4;

template <int D>
struct Attend {
  // Lanes that share a key, 16 bytes each; keys that the block has at a time.
  static constexpr int kLanes = D / kWide, kTeams = kAttendThreads / kLanes;

  // Softmax of each team: largest score, sum of 2^(score - largest), that sum of the values.
  struct Shared {
    float largest[kTeams][kQueries], sum[kTeams][kQueries];
    float out[kTeams][kQueries][D];
  };

  static __device__ __forceinline__ void run(bf16* o, float* partial, const bf16* q,
                                             const Sequence* sequences, unsigned layer,
                                             const Heads& heads, float scale, unsigned splits) {
    __shared__ Shared shared;
    const unsigned group = heads.queries / heads.kv, parts = (group + kQueries - 1) / kQueries;
    unsigned block = blockIdx.x;
    const unsigned split = block % splits;
    block /= splits;
    const unsigned part = block % parts;
    block /= parts;
    const unsigned kv = block % heads.kv, row = block / heads.kv;
    const Sequence sequence = sequences[row];
    const unsigned begin = split * kSplit, end = min(begin + kSplit, sequence.position + 1);
    if (begin > sequence.position) return;
    const unsigned queries = min(unsigned(kQueries), group - part * kQueries);
    const unsigned head = kv * group + part * kQueries;

    const unsigned team = threadIdx.x / kLanes, column = threadIdx.x % kLanes * kWide;
    const bool mine = column < heads.d;
    float query[kQueries][kWide] = {}, out[kQueries][kWide] = {};
    float largest[kQueries], sum[kQueries] = {};
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      largest[i] = -INFINITY;
      if (i < queries && mine) {
        load(query[i], q + (size_t(row) * heads.queries + head + i) * heads.d + column);
      }
    }
    const unsigned width = heads.kv * heads.d;
    const bf16* keys = sequence.rows(layer, 0, width) + kv * heads.d + column;
    const bf16* values = sequence.rows(layer, 1, width) + kv * heads.d + column;
    for (unsigned base = begin; base < end; base += kTeams * kAhead) {
      float key[kAhead][kWide] = {}, value[kAhead][kWide] = {};
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const unsigned at = base + u * kTeams + team;
        if (at < end && mine) {
          load(key[u], keys + size_t(at) * width);
          load(value[u], values + size_t(at) * width);
        }
      }
#pragma unroll
      for (int i = 0; i < kQueries; ++i) {
        if (i >= queries) break;
        float score[kAhead], high = largest[i];
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          score[u] = 0.0f;
#pragma unroll
          for (int j = 0; j < kWide; ++j) score[u] += query[i][j] * key[u][j];
#pragma unroll
          for (int offset = kLanes / 2; offset > 0; offset /= 2) {
            score[u] += __shfl_xor_sync(0xffffffffu, score[u], offset);
          }
          score[u] = base + u * kTeams + team < end ? score[u] * scale : -INFINITY;
          high = fmaxf(high, score[u]);
        }
        // A team that has had no key yet has no largest score to subtract.
        const float zero = high == -INFINITY ? 0.0f : high;
        const float shrink = exp2f(largest[i] - zero);
        largest[i] = high;
        sum[i] *= shrink;
#pragma unroll
        for (int j = 0; j < kWide; ++j) out[i][j] *= shrink;
#pragma unroll
        for (int u = 0; u < kAhead; ++u) {
          const float weight = exp2f(score[u] - zero);
          sum[i] += weight;
#pragma unroll
          for (int j = 0; j < kWide; ++j) out[i][j] += weight * value[u][j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
      if (i >= queries) break;
      if (column == 0) shared.largest[team][i] = largest[i], shared.sum[team][i] = sum[i];
      // Four lanes begin with their second halves, so that eight lanes fill all banks.
      const bool second = threadIdx.x / 4 % 2 == 1;
      const float4 low = make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
      const float4 high = make_float4(out[i][4], out[i][5], out[i][6], out[i][7]);
      float* to = &shared.out[team][i][column];
      *reinterpret_cast<float4*>(to + (second ? 4 : 0)) = second ? high : low;
      *reinterpret_cast<float4*>(to + (second ? 0 : 4)) = second ? low : high;
    }
    __syncthreads();
    for (unsigned at = threadIdx.x; at < queries * D; at += kAttendThreads) {
      const unsigned i = at / D, c = at % D;
      if (c >= heads.d) continue;
      float high = -INFINITY;
      for (int t = 0; t < kTeams; ++t) high = fmaxf(high, shared.largest[t][i]);
      float total = 0.0f, value = 0.0f;
      for (int t = 0; t < kTeams; ++t) {
        const float weight = exp2f(shared.largest[t][i] - high);
        total += weight * shared.sum[t][i];
        value += weight * shared.out[t][i][c];
      }
      const size_t query_row = size_t(row) * heads.queries + head + i;
      if (partial == nullptr) {
        o[query_row * heads.d + c] = __float2bfloat16_rn(value / total);
      } else {
        float* here = partial + (query_row * splits + split) * (heads.d + 2);
        here[c] = value;
        if (c == 0) here[heads.d] = high, here[heads.d + 1] = total;
      }
    }
  }
};

}  // namespace

// One block for each 16 rows of each map's W, those of maps[i] from maps[i].first on (2^32 - 1 where
// there is no map).
extern "C" __global__ void __launch_bounds__(kThreads) decode_linear_bf16_n8(LinearArgs args) {
  Linear<1>::run(args);
}
extern "C" __global__ void __launch_bounds__(kThreads) decode_linear_bf16_n16(LinearArgs args) {
  Linear<2>::run(args);
}
// Two blocks a multiprocessor: for more of them ptxas would spill where 48 warps fit (sm_86).
extern "C" __global__ void __launch_bounds__(kThreads, 2) decode_linear_bf16_n32(LinearArgs args) {
  Linear<4>::run(args);
}

// Rotates q to `turned` and k into the cache, and copies v there. One block a sequence; table:
// [positions, d] fp32 cosines and sines as in rope.cu, d even.
extern "C" __global__ void __launch_bounds__(256)
    decode_append_bf16(bf16* __restrict__ turned, const bf16* __restrict__ q,
                       const bf16* __restrict__ k, const bf16* __restrict__ v,
                       const Sequence* __restrict__ sequences, const float* __restrict__ table,
                       unsigned layer, unsigned queries, unsigned kv, unsigned d) {
  const Sequence sequence = sequences[blockIdx.x];
  const unsigned width = kv * d, half = d / 2;
  const float* cosines = table + size_t(sequence.position) * d;
  bf16* key = sequence.rows(layer, 0, width) + size_t(sequence.position) * width;
  bf16* value = sequence.rows(layer, 1, width) + size_t(sequence.position) * width;
  const size_t q_at = size_t(blockIdx.x) * queries * d, kv_at = size_t(blockIdx.x) * width;
  for (unsigned pair = threadIdx.x; pair < (queries + kv) * half; pair += blockDim.x) {
    const unsigned head = pair / half, i = pair % half;
    const bool is_query = head < queries;
    const unsigned at = (is_query ? head : head - queries) * d + i;
    const bf16* from = is_query ? q + q_at : k + kv_at;
    bf16* to = is_query ? turned + q_at : key;
    const float a = __bfloat162float(from[at]), b = __bfloat162float(from[at + half]);
    const float c = cosines[i], s = cosines[half + i];
    to[at] = __float2bfloat16_rn(a * c - b * s);
    to[at + half] = __float2bfloat16_rn(b * c + a * s);
  }
  for (unsigned i = threadIdx.x; i < width; i += blockDim.x) value[i] = v[kv_at + i];
}

// One block for each split, 8 queries of a group, key/value head and sequence, the split fastest;
// scale = log2(e) / sqrt(d). Results go to o where partial is null (one split), else to partial:
// [batch, queries, splits, d + 2] fp32, weighted values, largest score and sum of weights.
extern "C" __global__ void __launch_bounds__(kAttendThreads)
    decode_attend_bf16_d64(bf16* __restrict__ o, float* __restrict__ partial,
                           const bf16* __restrict__ q, const Sequence* __restrict__ sequences,
                           unsigned layer, unsigned queries, unsigned kv, unsigned d, float scale,
                           unsigned splits) {
  Attend<64>::run(o, partial, q, sequences, layer, {queries, kv, d}, scale, splits);
}
extern "C" __global__ void __launch_bounds__(kAttendThreads)
    decode_attend_bf16_d128(bf16* __restrict__ o, float* __restrict__ partial,
                            const bf16* __restrict__ q, const Sequence* __restrict__ sequences,
                            unsigned layer, unsigned queries, unsigned kv, unsigned d, float scale,
                            unsigned splits) {
  Attend<128>::run(o, partial, q, sequences, layer, {queries, kv, d}, scale, splits);
}

// One block for each query head of each sequence, d threads rounded up to whole warps.
extern "C" __global__ void __launch_bounds__(kAttendThreads)
    decode_combine_bf16(bf16* __restrict__ o, const float* __restrict__ partial,
                        const Sequence* __restrict__ sequences, unsigned queries, unsigned d,
                        unsigned splits) {
  const unsigned position = sequences[blockIdx.x / queries].position, c = threadIdx.x;
  const unsigned own = position / kSplit + 1;
  const float* parts = partial + size_t(blockIdx.x) * splits * (d + 2);
  if (c >= d) return;
  float high = -INFINITY;
  for (unsigned i = 0; i < own; ++i) high = fmaxf(high, parts[i * (d + 2) + d]);
  float total = 0.0f, value = 0.0f;
  for (unsigned i = 0; i < own; ++i) {
    const float* part = parts + i * (d + 2);
    const float weight = exp2f(part[d] - high);
    total += weight * part[d + 1];
    value += weight * part[c];
  }
  o[size_t(blockIdx.x) * d + c] = __float2bfloat16_rn(value / total);
}
