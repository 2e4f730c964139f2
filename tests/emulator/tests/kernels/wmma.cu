// CUDA's warp matrix API: D = A B + C of one tile, with C and D in shared memory on the way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

using namespace nvcuda;

template <int M, int N, int K, typename T, typename Load, typename Acc, typename LayoutA, typename LayoutB>
__device__ void tile(const T *a, const T *b, const Acc *c, Acc *d) {
  constexpr bool row_a = std::is_same<LayoutA, wmma::row_major>::value;
  constexpr bool row_b = std::is_same<LayoutB, wmma::row_major>::value;
  __shared__ Acc staged[M * N];
  wmma::fragment<wmma::matrix_a, M, N, K, Load, LayoutA> fa;
  wmma::fragment<wmma::matrix_b, M, N, K, Load, LayoutB> fb;
  wmma::fragment<wmma::accumulator, M, N, K, Acc> fc;
  wmma::load_matrix_sync(fa, a, row_a ? K : M);
  wmma::load_matrix_sync(fb, b, row_b ? N : K);
  wmma::load_matrix_sync(fc, c, N, wmma::mem_row_major);
  for (int i = 0; i < fc.num_elements; i++) fc.x[i] = fc.x[i] + fc.x[i];
  wmma::mma_sync(fc, fa, fb, fc);
  wmma::store_matrix_sync(staged, fc, N, wmma::mem_row_major);
  __syncwarp();
  for (int i = threadIdx.x; i < M * N; i += 32) d[i] = staged[i];
}

#define TILE(name, M, N, K, T, Load, Acc, LayoutA, LayoutB)                                       \
  extern "C" __global__ void name(const T *a, const T *b, const Acc *c, Acc *d) {                \
    tile<M, N, K, T, Load, Acc, wmma::LayoutA, wmma::LayoutB>(a, b, c, d);                       \
  }
TILE(f16_16x16, 16, 16, 16, half, half, float, row_major, col_major)
TILE(f16_32x8, 32, 8, 16, half, half, float, col_major, row_major)
TILE(f16_half, 8, 32, 16, half, half, half, row_major, row_major)
TILE(bf16_16x16, 16, 16, 16, __nv_bfloat16, __nv_bfloat16, float, row_major, col_major)
TILE(bf16_8x32, 8, 32, 16, __nv_bfloat16, __nv_bfloat16, float, col_major, col_major)
TILE(tf32_16x16, 16, 16, 8, float, wmma::precision::tf32, float, row_major, col_major)
TILE(s8_16x16, 16, 16, 16, signed char, signed char, int, row_major, col_major)
TILE(u8_32x8, 32, 8, 16, unsigned char, unsigned char, int, row_major, col_major)
