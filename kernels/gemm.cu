// Matrix products on tensor cores: out = alpha (L R + U V) + bias + residual, where L is [m, k]
// and R [k, n], each stored in the layout of the kernel's name:
//   nt: lhs [m, k], rhs [n, k]    (Y = X W^T)
//   nn: lhs [m, k], rhs [k, n]    (dX = dY W)
//   tn: lhs [k, m], rhs [k, n]    (dW = dY^T X)
// U V is a second product of depth low_k (0: none) in the same layout: a low-rank adapter rides in
// the same pass as extra K.
//
// lhs, rhs, low_lhs, low_rhs: bf16, row-major, rows `..._stride` values apart; bias: [n] bf16 or
// fp32; residual: [m, n] bf16; out: [m, n] bf16 or fp32, written (=) or, with kAdd, added to (+=).
// Accumulation in fp32. With splits > 1, slice s of K goes to out + s m n, fp32, and
// gemm_sum adds the slices in their order, so that the result has the same bits in every run.
// Method: multistage tiles as in CUTLASS (cp.async ring, ldmatrix from permuted shared memory).
// Least work: 2 m n (k + low_k) FLOP; least traffic: each operand once, out once.

#include "common/gemm_epilogue.cuh"
#include "common/gemm_tile.cuh"

// One launch's operands; src/ops/gemm/cuda.rs fills it.
struct GemmArgs {
  void* out;
  const __nv_bfloat16* lhs;
  const __nv_bfloat16* rhs;
  const __nv_bfloat16* low_lhs;
  const __nv_bfloat16* low_rhs;
  const void* bias;
  const __nv_bfloat16* residual;
  unsigned lhs_stride, rhs_stride, low_lhs_stride, low_rhs_stride;
  unsigned m, n, k, low_k;
  float alpha;
  unsigned flags, splits;
  unsigned unused[7];
};
static_assert(sizeof(GemmArgs) == 128, "as the launcher has it");

namespace {

// Tiles are visited in bands of this many rows of tiles, so that the blocks that run at one time
// share operands in L2.
constexpr unsigned kBand = 8;

struct Place {
  unsigned row, col, split;
};

template <class T>
__device__ __forceinline__ Place place(const GemmArgs& g) {
  const unsigned rows = (g.m + T::kM - 1) / T::kM, cols = (g.n + T::kN - 1) / T::kN;
  const unsigned tile = blockIdx.x % (rows * cols);
  const unsigned band = tile / (kBand * cols) * kBand, within = tile % (kBand * cols);
  const unsigned height = min(rows - band, kBand);
  return {(band + within % height) * T::kM, within / height * T::kN, blockIdx.x / (rows * cols)};
}

template <Layout kLayout>
__device__ __forceinline__ Operand left(const __nv_bfloat16* data, unsigned m, unsigned k,
                                        unsigned stride) {
  return kLayout == Layout::kTn ? Operand{data, k, m, stride} : Operand{data, m, k, stride};
}

template <Layout kLayout>
__device__ __forceinline__ Operand right(const __nv_bfloat16* data, unsigned n, unsigned k,
                                         unsigned stride) {
  return kLayout == Layout::kNt ? Operand{data, n, k, stride} : Operand{data, k, n, stride};
}

template <class T, Layout kLayout, bool kWide>
__device__ __forceinline__ void gemm(const GemmArgs& g) {
  using P = Product<T, kLayout, kWide>;
  static_assert(T::kWarps * kMmaM * (T::kWarpN + 8) * 4 <= T::kStages * P::kStageBytes,
                "the accumulators pass through the ring's memory");
  extern __shared__ __align__(128) unsigned char shared[];
  const Place at = place<T>(g);
  const P low{left<kLayout>(g.low_lhs, g.m, g.low_k, g.low_lhs_stride),
              right<kLayout>(g.low_rhs, g.n, g.low_k, g.low_rhs_stride)};
  const P full{left<kLayout>(g.lhs, g.m, g.k, g.lhs_stride),
               right<kLayout>(g.rhs, g.n, g.k, g.rhs_stride)};
  const unsigned stages = (g.k + kStageK - 1) / kStageK;
  const unsigned share = (stages + g.splits - 1) / g.splits;
  const unsigned begin = min(at.split * share, stages);
  typename P::Accumulator acc = {};
  accumulate<P, T>(acc, low, full, begin, min(begin + share, stages), at.row, at.col,
                   shared_address(shared), [](typename P::Accumulator&) {});
  Output out{g.out, g.bias, g.residual, g.m, g.n, g.alpha, g.flags};
  if (g.splits > 1) out.data = static_cast<float*>(g.out) + size_t(at.split) * g.m * g.n;
  write_tile<T>(acc, out, at.row, at.col, reinterpret_cast<float*>(shared));
}

using Square = Tile<128, 128, 64, 32, 4>;
using Small = Tile<128, 32, 32, 32, 4>;

}  // namespace

extern "C" __global__ void __launch_bounds__(Square::kThreads)
    gemm_nt_128x128(const __grid_constant__ GemmArgs g) {
  gemm<Square, Layout::kNt, true>(g);
}

extern "C" __global__ void __launch_bounds__(Square::kThreads)
    gemm_nn_128x128(const __grid_constant__ GemmArgs g) {
  gemm<Square, Layout::kNn, true>(g);
}

extern "C" __global__ void __launch_bounds__(Square::kThreads)
    gemm_tn_128x128(const __grid_constant__ GemmArgs g) {
  gemm<Square, Layout::kTn, true>(g);
}

// Rows at any address.
extern "C" __global__ void __launch_bounds__(Small::kThreads)
    gemm_nt_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Small, Layout::kNt, false>(g);
}

extern "C" __global__ void __launch_bounds__(Small::kThreads)
    gemm_nn_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Small, Layout::kNn, false>(g);
}

extern "C" __global__ void __launch_bounds__(Small::kThreads)
    gemm_tn_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Small, Layout::kTn, false>(g);
}
