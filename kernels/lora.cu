// Dropout of an adapter's inputs (Hu et al. 2021, arXiv 2106.09685): half i % 2, lower first, of
// word i / 2 of the stream decides on element i, which is kept where it is not below the threshold.
//
// x, dropped: [n] bf16, 16-byte aligned; mask: bit i % 8 of byte i / 8 is set where element i is
// kept, or null. What is kept is not scaled: the factor is left to the products, which apply it in
// fp32. step: null, or two words that stand for high1 and high2. n / 8 threads rounded
// up. Least traffic: 4 n bytes, and n / 8 for the mask.

#include "common/gemm_tile.cuh"
#include "common/pack.cuh"
#include "common/philox.cuh"

extern "C" __global__ void lora_dropout_bf16(__nv_bfloat16* __restrict__ dropped,
                                             uint8_t* __restrict__ mask,
                                             const __nv_bfloat16* __restrict__ x, uint64_t n,
                                             uint32_t key0, uint32_t key1, uint32_t high0,
                                             uint32_t high1, uint32_t high2,
                                             const uint32_t* __restrict__ step,
                                             uint32_t threshold) {
  const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint64_t at = thread * kWide;
  if (at >= n) return;
  const Stream stream{key0, key1, high0, step ? step[0] : high1, step ? step[1] : high2};
  const uint32_t kept = stream.kept(uint32_t(thread), threshold);
  if (mask) mask[thread] = uint8_t(kept);
  if (at + kWide <= n) {
    float v[kWide];
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = kept >> i & 1 ? v[i] : 0.0f;
    store(dropped + at, v);
  } else {
    for (uint64_t i = at; i < n; ++i) {
      dropped[i] = kept >> (i - at) & 1 ? x[i] : __float2bfloat16_rn(0.0f);
    }
  }
}

// What the two gradients that read dY [T, out] take of it, from one pass over it:
//   dU = s dY B, dB = dY^T U,  U [T, r] bf16 with rows `u_stride` apart, B [out, r] bf16,
// dU in bf16, dB in fp32. A block multiplies 512 rows by `span` columns of dY, stage by stage; its
// share of dU stays in registers, and so does that of dB while a stage's columns are in turn.
// Shares go to du [spans, T, r] and db [row blocks, out, r] in fp32; lora_sum adds them in
// their order. out and r are multiples of 8. Least work: 4 T out r FLOP; least traffic: dY, U, B
// once, the results once; the shares add 8 T r spans + 8 out r T / 512 bytes.

namespace {

namespace up {

constexpr int kThreads = 256;
// Rows of a stage, and stages that lie below each other in a block.
constexpr int kRows = 128, kTiles = 4;
constexpr int kRanks = 32;
constexpr int kStages = 3;
// A stage of dY, seen along its columns and across its rows.
using Along = Stage<kRows, true>;
using Across = Stage<kStageK, false>;
// 64 rows of U or B.
using Ranks = Stage<kRanks, false>;

}  // namespace up

}  // namespace

extern "C" __global__ void __launch_bounds__(up::kThreads)
    lora_up_backward(float* __restrict__ du, float* __restrict__ db,
                     const __nv_bfloat16* __restrict__ dy, const __nv_bfloat16* __restrict__ u,
                     const __nv_bfloat16* __restrict__ b, unsigned u_stride, unsigned rows,
                     unsigned out, unsigned rank, unsigned span) {
  using namespace up;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t weights = stages + kStages * Along::kBytes;
  const uint32_t activations = weights + kStages * Ranks::kBytes;

  const unsigned rank_tiles = (rank + kRanks - 1) / kRanks, spans = (out + span - 1) / span;
  const unsigned first_rank = blockIdx.x % rank_tiles * kRanks;
  const unsigned at_span = blockIdx.x / rank_tiles % spans;
  const unsigned row_block = blockIdx.x / rank_tiles / spans;
  const unsigned first_row = row_block * kTiles * kRows, first_col = at_span * span;
  const unsigned tiles = min((rows - first_row + kRows - 1) / kRows, unsigned(kTiles));
  const unsigned chunks = (min(span, out - first_col) + kStageK - 1) / kStageK;

  const Operand from_dy{dy, rows, out, out}, from_u{u, rows, rank, u_stride};
  const Operand from_b{b, out, rank, rank};
  const auto fill = [&](unsigned index) {
    const unsigned chunk = index / tiles, tile = index % tiles;
    if (chunk < chunks) {
      const unsigned col = first_col + chunk * kStageK;
      Along::fill<kThreads, true>(stages + index % kStages * Along::kBytes, from_dy,
                                  first_row + tile * kRows, col);
      if (tile == 0) {
        Ranks::fill<kThreads, true>(weights + chunk % kStages * Ranks::kBytes, from_b, col,
                                    first_rank);
      }
    }
    copy_commit();
  };
  for (unsigned i = 0; i < tiles * kRows / kStageK; ++i) {
    Ranks::fill<kThreads, true>(activations + i * Ranks::kBytes, from_u, first_row + i * kStageK,
                                first_rank);
  }
  for (unsigned index = 0; index < kStages - 1; ++index) fill(index);

  // dU: 16 rows of each tile for each warp. dB: 16 columns of a stage and half of the ranks.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_rows = warp * kMmaM, own_cols = warp % 4 * kMmaM, own_ranks = warp / 4 * 16;
  float to_u[kTiles][kRanks / kMmaN][4] = {};
  for (unsigned chunk = 0; chunk < chunks; ++chunk) {
    float to_b[2][4] = {};
    const uint32_t weight = weights + chunk % kStages * Ranks::kBytes;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= tiles) break;
      const unsigned index = chunk * tiles + tile;
      copy_wait<kStages - 2>();
      __syncthreads();
      // The stage that all warps have left before the barrier is the next to fill.
      fill(index + kStages - 1);
      const uint32_t stage = stages + index % kStages * Along::kBytes;
      uint32_t left[4], right[4];
#pragma unroll
      for (int k = 0; k < kStageK; k += kMmaK) {
        Along::lhs(left, stage, own_rows, k);
#pragma unroll
        for (int j = 0; j < kRanks / kMmaN; j += 2) {
          Ranks::rhs(right, weight, j * kMmaN, k);
          mma_bf16(to_u[tile][j], left, right[0], right[1]);
          mma_bf16(to_u[tile][j + 1], left, right[2], right[3]);
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; k += kMmaK) {
        const int part = tile * (kRows / kStageK) + k / kStageK;
        Across::lhs(left, stage, own_cols, k);
        Ranks::rhs(right, activations + part * Ranks::kBytes, own_ranks, k % kStageK);
        mma_bf16(to_b[0], left, right[0], right[1]);
        mma_bf16(to_b[1], left, right[2], right[3]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned col = first_col + chunk * kStageK + own_cols + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const unsigned at = first_rank + own_ranks + j * kMmaN + lane % 4 * 2;
        if (col >= out || at >= rank) continue;
        *reinterpret_cast<float2*>(db + (size_t(row_block) * out + col) * rank + at) =
            make_float2(to_b[j][2 * half], to_b[j][2 * half + 1]);
      }
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = first_row + tile * kRows + own_rows + half * 8 + lane / 4;
#pragma unroll
      for (int j = 0; j < kRanks / kMmaN; ++j) {
        const unsigned at = first_rank + j * kMmaN + lane % 4 * 2;
        if (row >= rows || at >= rank) continue;
        *reinterpret_cast<float2*>(du + (size_t(at_span) * rows + row) * rank + at) =
            make_float2(to_u[tile][j][2 * half], to_u[tile][j][2 * half + 1]);
      }
    }
  }
}

namespace {

// Four values of the sum of `parts` matrices [rows, width], times alpha, for each thread.
template <class Out>
__device__ __forceinline__ void sum_parts(Out* out, unsigned stride, const float* partial,
                                          unsigned parts, size_t size, unsigned width,
                                          float alpha) {
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at >= size) return;
  float sum[kWideFloat] = {};
  for (unsigned part = 0; part < parts; ++part) {
    float v[kWideFloat];
    load(v, partial + part * size + at);
#pragma unroll
    for (int i = 0; i < kWideFloat; ++i) sum[i] += v[i];
  }
#pragma unroll
  for (int i = 0; i < kWideFloat; ++i) sum[i] *= alpha;
  store(out + at / width * stride + at % width, sum);
}

}  // namespace

// out = alpha times the sum of partial [parts, size / width, width], whose width is a multiple of
// 4; rows of out are `stride` apart.
extern "C" __global__ void lora_sum_bf16(__nv_bfloat16* __restrict__ out, unsigned stride,
                                         const float* __restrict__ partial, unsigned parts,
                                         size_t size, unsigned width, float alpha) {
  sum_parts(out, stride, partial, parts, size, width, alpha);
}

extern "C" __global__ void lora_sum_f32(float* __restrict__ out, unsigned stride,
                                        const float* __restrict__ partial, unsigned parts,
                                        size_t size, unsigned width, float alpha) {
  sum_parts(out, stride, partial, parts, size, width, alpha);
}
