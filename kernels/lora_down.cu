// The products of adapters with the inputs X [T, in] that up to three modules share, each with
// dropout of its own (Hu et al. 2021, arXiv 2106.09685), from one pass over X:
//   U_i = drop_i(X) A_i^T [T, r],  dA_i = dU_i^T drop_i(X) [r, in].
// Half j % 2, lower first, of word j / 2 of a module's stream decides on element j of X, which is
// kept where it is not below the threshold; at 0 nothing is drawn. What is kept is not scaled: the
// factor is left to the sums. Forward draws in registers, each bit once, and leaves one bit an
// element behind for backward.
//
// A block multiplies 128 rows (forward) or 128 columns (backward) of X by 32 ranks of each module,
// over one slice of the reduction; its share goes to memory in fp32, and lora_sum_bf16 or
// lora_down_sum add the shares in their order. X, A [modules r, in], dU [T, modules r]: bf16;
// masks: [modules, T, in / 32] words, the lowest bit first. in is a multiple of 32, r of 8.
// Least work: 2 T in r FLOP a module; least traffic: X, A, dU and masks once, the shares once.

#include "common/gemm_tile.cuh"
#include "common/pack.cuh"
#include "common/philox.cuh"
#include "common/shares.cuh"

// One launch's operands; src/ops/lora/cuda/down.rs fills it.
struct DownArgs {
  float* shares;              // [slices, T, modules r] forward, [slices, modules r, in] backward
  const __nv_bfloat16* x;     // [T, in]
  const __nv_bfloat16* with;  // A forward, dU backward
  uint32_t* masks;            // or null where nothing is dropped or nobody will ask
  const uint32_t* step;       // null, or two words that stand for high1 and high2 of all streams
  unsigned rows, in, rank, slices, threshold;
  // key0, key1, high0, high1, high2 of each module's stream.
  uint32_t streams[3][5];
  unsigned unused[2];
};
static_assert(sizeof(DownArgs) == 128, "as the launcher has it");

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Ranks of each module for a block, and the fragments of them.
constexpr int kRanks = 32;
constexpr int kFragments = kRanks / kMmaN;
constexpr int kStages = 3;
constexpr int kSteps = kStageK / kMmaK;

// What a block works on: ranks, and rows or columns of X, `extent` of them, from these on, over the
// stages of a slice of the reduction, which is over `depth`.
struct Part {
  unsigned rank, first, slice, begin, end;

  __device__ __forceinline__ Part(const DownArgs& g, unsigned extent, unsigned depth) {
    const unsigned rank_tiles = (g.rank + kRanks - 1) / kRanks;
    rank = blockIdx.x % rank_tiles * kRanks;
    slice = blockIdx.x / rank_tiles % g.slices;
    first = blockIdx.x / rank_tiles / g.slices * extent;
    const unsigned stages = (depth + kStageK - 1) / kStageK;
    const unsigned share = (stages + g.slices - 1) / g.slices;
    begin = min(slice * share, stages);
    end = min(begin + share, stages);
  }
};

// Sets to zero the values of a pair whose bit, the lower one for the lower half, is zero.
__device__ __forceinline__ uint32_t keep_pair(uint32_t pair, uint32_t low, uint32_t high) {
  return pair & ((low & 1) * 0xffffu | (high & 1) * 0xffff0000u);
}

// acc += left right for a module's 32 ranks at depth k of a stage.
template <class Right>
__device__ __forceinline__ void multiply(float (&acc)[kFragments][4], const uint32_t (&left)[4],
                                         uint32_t stage, int k) {
#pragma unroll
  for (int j = 0; j < kFragments; j += 2) {
    uint32_t right[4];
    Right::rhs(right, stage, j * kMmaN, k);
    mma_bf16(acc[j], left, right[0], right[1]);
    mma_bf16(acc[j + 1], left, right[2], right[3]);
  }
}

template <int kModules>
__device__ __forceinline__ void down_forward(const DownArgs& g) {
  constexpr int kRows = kWarps * kMmaM;
  using Inputs = Stage<kRows, true>;
  using Factors = Stage<kRanks, true>;
  constexpr int kStageBytes = Inputs::kBytes + kModules * Factors::kBytes;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t ring = shared_address(shared);

  const Part part(g, kRows, g.in);

  const auto fill = [&](unsigned index) {
    if (index < part.end) {
      const uint32_t stage = ring + index % kStages * kStageBytes;
      Inputs::fill<kThreads, true>(stage, Operand{g.x, g.rows, g.in, g.in}, part.first,
                                   index * kStageK);
#pragma unroll
      for (int m = 0; m < kModules; ++m) {
        const Operand a{g.with + size_t(m) * g.rank * g.in, g.rank, g.in, g.in};
        Factors::fill<kThreads, true>(stage + Inputs::kBytes + m * Factors::kBytes, a, part.rank,
                                      index * kStageK);
      }
    }
    copy_commit();
  };
  for (unsigned i = 0; i < kStages - 1; ++i) fill(part.begin + i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane % 4;
  const unsigned row = part.first + warp * kMmaM + lane / 4;
  // A quad's fragment is four blocks of eight: rows `row` and `row` + 8 of columns 0 to 7, then of
  // columns 8 to 15. Each of its threads draws for one of them, and writes a word of one row.
  const unsigned own_row = row + own % 2 * 8;
  const bool leaves_masks = g.masks && part.rank == 0 && own_row < g.rows;
  float acc[kModules][kFragments][4] = {};
  for (unsigned index = part.begin; index < part.end; ++index) {
    copy_wait<kStages - 2>();
    __syncthreads();
    // The stage that all warps have left before the barrier is the next to fill.
    fill(index + kStages - 1);
    const uint32_t stage = ring + index % kStages * kStageBytes;
    const unsigned first_col = index * kStageK;
#pragma unroll
    for (int m = 0; m < kModules; ++m) {
      const uint32_t factors = stage + Inputs::kBytes + m * Factors::kBytes;
      const uint32_t(&words)[5] = g.streams[m];
      const Stream stream{words[0], words[1], words[2], g.step ? g.step[0] : words[3],
                          g.step ? g.step[1] : words[4]};
      // Those of the 32 columns that the thread writes a word for, 16 of two rows each.
      uint32_t bits[2];
      // Two draws side by side are what registers allow.
#pragma unroll 2
      for (int s = 0; s < kSteps; ++s) {
        uint32_t left[4];
        Inputs::lhs(left, stage, warp * kMmaM, s * kMmaK);
        if (g.threshold > 0) {
          const unsigned col = first_col + s * kMmaK + own / 2 * 8;
          const uint64_t at = uint64_t(own_row) * g.in + col;
          uint32_t all = stream.kept(uint32_t(at / 8), g.threshold) << 8 * own;
          all |= __shfl_xor_sync(~0u, all, 1);
          all |= __shfl_xor_sync(~0u, all, 2);
          if (s / 2 == own / 2) bits[s % 2] = all;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t pair = all >> (8 * i + 2 * own);
            left[i] = keep_pair(left[i], pair, pair >> 1);
          }
        }
        multiply<Factors>(acc[m], left, factors, s * kMmaK);
      }
      const unsigned col = first_col + own / 2 * 32;
      if (g.threshold > 0 && leaves_masks && col < g.in) {
        // 8 bytes of a row, to which the next stage's are put in L2.
        g.masks[(size_t(m) * g.rows + own_row) * (g.in / 32) + col / 32] =
            __byte_perm(bits[0], bits[1], own % 2 ? 0x7531 : 0x6420);
      }
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int m = 0; m < kModules; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned at_row = row + half * 8;
      const size_t to = (size_t(part.slice) * g.rows + at_row) * kModules + m;
#pragma unroll
      for (int j = 0; j < kFragments; ++j) {
        const unsigned rank = part.rank + j * kMmaN + own * 2;
        if (at_row >= g.rows || rank >= g.rank) continue;
        *reinterpret_cast<float2*>(g.shares + to * g.rank + rank) =
            make_float2(acc[m][j][2 * half], acc[m][j][2 * half + 1]);
      }
    }
  }
}

template <int kModules>
__device__ __forceinline__ void down_backward(const DownArgs& g) {
  constexpr int kCols = kWarps * kMmaM;
  using Inputs = Stage<kCols, false>;
  using Gradients = Stage<kRanks, false>;
  // A stage's bits: a row of words for each row of X.
  constexpr int kWords = kCols / 32;
  constexpr int kMaskBytes = kStageK * kWords * 4;
  static_assert(kStageK * kWords == kThreads, "a word for each thread");
  constexpr int kModuleBytes = Gradients::kBytes + kMaskBytes;
  constexpr int kStageBytes = Inputs::kBytes + kModules * kModuleBytes;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t ring = shared_address(shared);

  const Part part(g, kCols, g.rows);
  const unsigned ranks = kModules * g.rank;

  const auto fill = [&](unsigned index) {
    if (index < part.end) {
      const uint32_t stage = ring + index % kStages * kStageBytes;
      const unsigned first_row = index * kStageK;
      Inputs::fill<kThreads, true>(stage, Operand{g.x, g.rows, g.in, g.in}, first_row, part.first);
#pragma unroll
      for (int m = 0; m < kModules; ++m) {
        const uint32_t to = stage + Inputs::kBytes + m * kModuleBytes;
        const Operand du{g.with + m * g.rank, g.rows, g.rank, ranks};
        Gradients::fill<kThreads, true>(to, du, first_row, part.rank);
        if (g.masks) {
          const unsigned row = first_row + threadIdx.x / kWords;
          const unsigned word = part.first / 32 + threadIdx.x % kWords;
          const bool inside = row < g.rows && word < g.in / 32;
          const uint32_t* from = g.masks + (size_t(m) * g.rows + row) * (g.in / 32) + word;
          copy_async_word(to + Gradients::kBytes + threadIdx.x * 4, inside ? from : g.masks,
                          inside);
        }
      }
    }
    copy_commit();
  };
  for (unsigned i = 0; i < kStages - 1; ++i) fill(part.begin + i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int own_cols = warp * kMmaM;
  // Where the bits of a thread's first column of its first row lie within a stage's.
  const unsigned place = lane % 4 * 2 * kWords + own_cols / 32, shift = own_cols % 32 + lane / 4;
  float acc[kModules][kFragments][4] = {};
  for (unsigned index = part.begin; index < part.end; ++index) {
    copy_wait<kStages - 2>();
    __syncthreads();
    fill(index + kStages - 1);
    const uint32_t stage = ring + index % kStages * kStageBytes;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      uint32_t left[4];
      Inputs::lhs(left, stage, own_cols, s * kMmaK);
#pragma unroll
      for (int m = 0; m < kModules; ++m) {
        const uint32_t from = stage + Inputs::kBytes + m * kModuleBytes;
        uint32_t some[4] = {left[0], left[1], left[2], left[3]};
        if (g.masks) {
          const unsigned masks = from - ring + Gradients::kBytes;
          const auto* words = reinterpret_cast<const uint32_t*>(shared + masks) + place;
          // Rows 0, 1, 8 and 9 from the thread's first one on.
          uint32_t bits[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            bits[i] = words[(s * kMmaK + i / 2 * 8 + i % 2) * kWords] >> shift;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int rows = i / 2 * 2, turn = i % 2 * 8;
            some[i] = keep_pair(some[i], bits[rows] >> turn, bits[rows + 1] >> turn);
          }
        }
        multiply<Gradients>(acc[m], some, from, s * kMmaK);
      }
    }
  }
  copy_wait<0>();
#pragma unroll
  for (int m = 0; m < kModules; ++m) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned rank = part.rank + j * kMmaN + lane % 4 * 2 + i % 2;
        const unsigned col = part.first + own_cols + lane / 4 + i / 2 * 8;
        if (rank >= g.rank || col >= g.in) continue;
        g.shares[(size_t(part.slice) * ranks + m * g.rank + rank) * g.in + col] = acc[m][j][i];
      }
    }
  }
}

}  // namespace

// Blocks a multiprocessor for which there are registers: left to itself ptxas spills to have more.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    lora_down_forward_1(const __grid_constant__ DownArgs g) {
  down_forward<1>(g);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    lora_down_forward_2(const __grid_constant__ DownArgs g) {
  down_forward<2>(g);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    lora_down_forward_3(const __grid_constant__ DownArgs g) {
  down_forward<3>(g);
}

extern "C" __global__ void __launch_bounds__(kThreads, 3)
    lora_down_backward_1(const __grid_constant__ DownArgs g) {
  down_backward<1>(g);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    lora_down_backward_2(const __grid_constant__ DownArgs g) {
  down_backward<2>(g);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    lora_down_backward_3(const __grid_constant__ DownArgs g) {
  down_backward<3>(g);
}

// out = alpha times the sum of partial [parts, size], size a multiple of 4: U of all modules from
// the shares of the slices. A thread for each four values. Least traffic: 4 parts size + 2 size bytes.
extern "C" __global__ void lora_sum_bf16(__nv_bfloat16* __restrict__ out,
                                         const float* __restrict__ partial, unsigned parts,
                                         size_t size, float alpha) {
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at >= size) return;
  float sum[kWideFloat] = {};
  sum_shares(sum, partial + at, parts, size);
#pragma unroll
  for (int i = 0; i < kWideFloat; ++i) sum[i] *= alpha;
  store(out + at, sum);
}

// The dA of each module, [size] fp32 (unused ones null): alpha times the sum of shares
// [slices, modules, size]. A thread for each four values; size is a multiple of 4. Least traffic:
// 4 (slices + 1) modules size bytes.
extern "C" __global__ void lora_down_sum(float* __restrict__ first, float* __restrict__ second,
                                         float* __restrict__ third,
                                         const float* __restrict__ shares, unsigned slices,
                                         unsigned modules, size_t size, float alpha) {
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWideFloat;
  if (at >= modules * size) return;
  float sum[kWideFloat] = {};
  sum_shares(sum, shares + at, slices, modules * size);
#pragma unroll
  for (int i = 0; i < kWideFloat; ++i) sum[i] *= alpha;
  const size_t module = at / size;
  store((module == 0 ? first : module == 1 ? second : third) + at % size, sum);
}

// The factors of up to three modules, rounded to bf16: their A [size_a] below each other, each B
// [size_b] on its own. A thread for each eight values, those of A first; sizes are multiples of 8.
// Least traffic: 6 bytes a value.
struct FactorArgs {
  __nv_bfloat16* a;
  __nv_bfloat16* b[3];
  const float* from_a[3];
  const float* from_b[3];
  uint64_t size_a, size_b[3];
  unsigned modules, unused[3];
};
static_assert(sizeof(FactorArgs) == 128, "as the launcher has it");

extern "C" __global__ void lora_factors_bf16(const __grid_constant__ FactorArgs g) {
  uint64_t at = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWide;
  const float* from = nullptr;
  __nv_bfloat16* to = nullptr;
#pragma unroll
  for (int i = 0; i < 6; ++i) {
    const int module = i % 3;
    const uint64_t size = i < 3 ? g.size_a : g.size_b[module];
    if (from || module >= g.modules) continue;
    if (at < size) {
      from = (i < 3 ? g.from_a : g.from_b)[module] + at;
      to = (i < 3 ? g.a + module * size : g.b[module]) + at;
    } else {
      at -= size;
    }
  }
  if (!from) return;
  float halves[2][kWideFloat];
  load(halves[0], from);
  load(halves[1], from + kWideFloat);
  float v[kWide];
#pragma unroll
  for (int i = 0; i < kWide; ++i) v[i] = halves[i / kWideFloat][i % kWideFloat];
  store(to, v);
}
