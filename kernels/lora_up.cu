// What the gradients of up to three adapters on one input take of their modules' dY [T, out]
// (Hu et al. 2021, arXiv 2106.09685), from one pass over each:
//   dU = s dY B, dB = dY^T U,
// U and dU: the modules' [T, r] side by side, bf16, rows of U `u_stride` apart; B [out, r] bf16; dB
// fp32. A block multiplies some rows by `span` columns of a module's dY, stage by stage; its share
// of dU stays in registers, and so does that of dB while a stage's columns are in turn.
// lora_up_sum adds the shares, fp32, in their order. out and r are multiples of 8. Least work:
// 4 T out r FLOP a module; least traffic: dY, U, B once, the results once; the shares add
// 8 T r for each span and 8 out r for each block of rows.

#include "common/gemm_tile.cuh"
#include "common/shares.cuh"

namespace {

constexpr int kModules = 3;

}  // namespace

// One launch's operands; src/ops/lora/cuda/up.rs fills it.
struct UpArgs {
  // [spans of all modules, T, r] of dU, then of each module [row blocks, out, r] of dB.
  float* shares;
  const __nv_bfloat16* u;
  __nv_bfloat16* du;
  const __nv_bfloat16* dy[kModules];
  const __nv_bfloat16* b[kModules];
  float* db[kModules];
  // 0 for modules that there are not.
  unsigned out[kModules];
  unsigned rows, rank, span, u_stride;
  float scale;

  __device__ __forceinline__ unsigned spans_of(unsigned module) const {
    return (out[module] + span - 1) / span;
  }
};
static_assert(sizeof(UpArgs) == 128, "as the launcher has it");

namespace {

constexpr int kThreads = 256;
// Rows of a stage, and stages that lie below each other in a block.
constexpr int kRows = 128, kTiles = 2;
constexpr int kRanks = 32;
constexpr int kStages = 3;
// A stage of dY, seen along its columns and across its rows.
using Along = Stage<kRows, true>;
using Across = Stage<kStageK, false>;
// 64 rows of U or B.
using Ranks = Stage<kRanks, false>;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    lora_up_backward(const __grid_constant__ UpArgs g) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  const uint32_t weights = stages + kStages * Along::kBytes;
  const uint32_t activations = weights + kStages * Ranks::kBytes;

  const unsigned rank_tiles = (g.rank + kRanks - 1) / kRanks;
  const unsigned row_blocks = (g.rows + kTiles * kRows - 1) / (kTiles * kRows);
  const unsigned first_rank = blockIdx.x % rank_tiles * kRanks;
  const unsigned row_block = blockIdx.x / rank_tiles % row_blocks;
  // Of all modules' spans.
  const unsigned span = blockIdx.x / rank_tiles / row_blocks;
  unsigned module = 0, at_span = span, before = 0, all_spans = g.spans_of(0);
#pragma unroll
  for (int i = 1; i < kModules; ++i) {
    if (module + 1 == i && at_span >= g.spans_of(module)) {
      at_span -= g.spans_of(module);
      before += g.out[module++];
    }
    all_spans += g.spans_of(i);
  }
  const unsigned out = g.out[module];
  float* du = g.shares + size_t(span) * g.rows * g.rank;
  float* db = g.shares + (size_t(all_spans) * g.rows + size_t(before) * row_blocks) * g.rank +
              size_t(row_block) * out * g.rank;
  const unsigned first_row = row_block * kTiles * kRows, first_col = at_span * g.span;
  const unsigned tiles = min((g.rows - first_row + kRows - 1) / kRows, unsigned(kTiles));
  const unsigned chunks = (min(g.span, out - first_col) + kStageK - 1) / kStageK;

  const Operand from_dy{g.dy[module], g.rows, out, out};
  const Operand from_u{g.u + module * g.rank, g.rows, g.rank, g.u_stride};
  const Operand from_b{g.b[module], out, g.rank, g.rank};
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
        if (col >= out || at >= g.rank) continue;
        *reinterpret_cast<float2*>(db + size_t(col) * g.rank + at) =
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
        if (row >= g.rows || at >= g.rank) continue;
        *reinterpret_cast<float2*>(du + size_t(row) * g.rank + at) =
            make_float2(to_u[tile][j][2 * half], to_u[tile][j][2 * half + 1]);
      }
    }
  }
}

// dU and dB of the modules from the shares of `row_blocks` blocks of rows. A thread for each four
// values, those of dU first. Least traffic: each share and each result once.
extern "C" __global__ void lora_up_sum(const __grid_constant__ UpArgs g, unsigned row_blocks) {
  size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  const size_t size = size_t(g.rows) * g.rank;
  const float* shares = g.shares;
  unsigned modules = 0;
#pragma unroll
  for (int i = 0; i < kModules; ++i) modules += g.out[i] > 0;
  float sum[kWideFloat] = {};
  for (unsigned module = 0; module < modules; ++module) {
    const unsigned spans = g.spans_of(module);
    if (at < size) {
      sum_shares(sum, shares + at, spans, size);
#pragma unroll
      for (int i = 0; i < kWideFloat; ++i) sum[i] *= g.scale;
      store(g.du + (at / g.rank * modules + module) * g.rank + at % g.rank, sum);
      return;
    }
    at -= size;
    shares += spans * size;
  }
  for (unsigned module = 0; module < modules; ++module) {
    const size_t size = size_t(g.out[module]) * g.rank;
    if (at < size) {
      sum_shares(sum, shares + at, row_blocks, size);
      store(g.db[module] + at, sum);
      return;
    }
    at -= size;
    shares += row_blocks * size;
  }
}
