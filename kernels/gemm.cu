// Matrix products on tensor cores: out = alpha (L R + keep mask * U V) + bias + residual, where L
// is [m, k] and R [k, n], each stored in the layout of the kernel's name:
//   nt: lhs [m, k], rhs [n, k]    (Y = X W^T)
//   nn: lhs [m, k], rhs [k, n]    (dX = dY W)
//   tn: lhs [k, m], rhs [k, n]    (dW = dY^T X)
// U V is a second product of depth low_k (0: none) in the same layout: a low-rank adapter rides in
// the same pass as extra K. mask (nn only; null: all kept): bit i % 8 of byte i / 8 tells whether
// the adapter's input i = row n + col was kept by dropout.
//
// lhs, rhs, low_lhs, low_rhs: bf16, row-major, rows `..._stride` values apart; bias: [n] bf16 or
// fp32; residual: [m, n] bf16; out: [m, n] bf16 or fp32, written (=) or, with kAdd, added to (+=).
// Accumulation in fp32. With splits > 1, the product over slice s of K goes to out + s m n, fp32,
// and gemm_sum adds them in their order, so that the result has the same bits in every run.
// Method: multistage tiles as in CUTLASS (cp.async ring, ldmatrix from permuted shared memory).
// Least work: 2 m n (k + low_k) FLOP; least traffic: each operand once, out once.

#include "common/gemm_args.cuh"
#include "common/gemm_epilogue.cuh"
#include "common/gemm_tile.cuh"

namespace {

struct Place {
  unsigned row, col, split;
};

template <class T>
__device__ __forceinline__ Place place(const GemmArgs& g) {
  const unsigned rows = (g.m + T::kM - 1) / T::kM, cols = (g.n + T::kN - 1) / T::kN;
  const TilePlace at = place_tile(blockIdx.x % (rows * cols), rows, cols, kBand);
  return {at.row * T::kM, at.col * T::kN, blockIdx.x / (rows * cols)};
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
  constexpr bool kMasked = kLayout == Layout::kNn;
  // The largest tile leaves no registers for more than words of the mask.
  constexpr bool kWords = T::kN > 128;
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
                   shared_address(shared), [&](typename P::Accumulator& a) {
                     if (kMasked && g.mask) drop<T, kWide, kWords>(a, g, at.row, at.col);
                   });
  Output out{g.out, g.bias, g.residual, g.m, g.n, g.alpha, g.flags};
  if (g.splits > 1) out.data = static_cast<float*>(g.out) + size_t(at.split) * g.m * g.n;
  write_tile<T>(acc, out, at.row, at.col, reinterpret_cast<float*>(shared));
}

// 96 KiB of shared memory, which every device grants a block.
using Square = Tile<128, 128, 64, 32, 3>;
// 144 KiB: not on sm_86, sm_89 and sm_120.
using Wide = Tile<128, 256, 64, 64, 3>;
// For a side as long as a rank.
using Narrow = Tile<128, 32, 32, 32, 4>;
using Flat = Tile<32, 128, 32, 32, 4>;

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

extern "C" __global__ void __launch_bounds__(Wide::kThreads)
    gemm_nt_128x256(const __grid_constant__ GemmArgs g) {
  gemm<Wide, Layout::kNt, true>(g);
}

extern "C" __global__ void __launch_bounds__(Wide::kThreads)
    gemm_nn_128x256(const __grid_constant__ GemmArgs g) {
  gemm<Wide, Layout::kNn, true>(g);
}

extern "C" __global__ void __launch_bounds__(Narrow::kThreads)
    gemm_nt_128x32(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kNt, true>(g);
}

extern "C" __global__ void __launch_bounds__(Narrow::kThreads)
    gemm_nn_128x32(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kNn, true>(g);
}

extern "C" __global__ void __launch_bounds__(Narrow::kThreads)
    gemm_tn_128x32(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kTn, true>(g);
}

extern "C" __global__ void __launch_bounds__(Flat::kThreads)
    gemm_tn_32x128(const __grid_constant__ GemmArgs g) {
  gemm<Flat, Layout::kTn, true>(g);
}

// Operands whose rows lie at any address. Two blocks a multiprocessor: for more ptxas would spill.
extern "C" __global__ void __launch_bounds__(Narrow::kThreads, 2)
    gemm_nt_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kNt, false>(g);
}

extern "C" __global__ void __launch_bounds__(Narrow::kThreads, 2)
    gemm_nn_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kNn, false>(g);
}

extern "C" __global__ void __launch_bounds__(Narrow::kThreads, 2)
    gemm_tn_unaligned(const __grid_constant__ GemmArgs g) {
  gemm<Narrow, Layout::kTn, false>(g);
}

// out = alpha (sum of the slices) + bias + residual; a thread for each value, or for four of them
// with kVector. partial: [splits, m, n] fp32. Least traffic: 4 splits m n bytes and the result.
extern "C" __global__ void gemm_sum(const __grid_constant__ GemmArgs g,
                                    const float* __restrict__ partial) {
  const unsigned width = g.flags & kVector ? 4 : 1;
  const size_t at = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * width;
  const size_t size = size_t(g.m) * g.n;
  if (at >= size) return;
  const Output out{g.out, g.bias, g.residual, g.m, g.n, g.alpha, g.flags};
  const unsigned row = at / g.n, col = at % g.n;
  if (g.flags & kVector) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (unsigned s = 0; s < g.splits; ++s) {
      const float4 v = *reinterpret_cast<const float4*>(partial + s * size + at);
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    out.put4(row, col, sum);
  } else {
    float sum = 0.0f;
    for (unsigned s = 0; s < g.splits; ++s) sum += partial[s * size + at];
    out.put(row, col, sum);
  }
}
