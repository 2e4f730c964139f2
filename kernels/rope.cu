// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half layout: values i and
// i + D/2 of a head turn together by the angle of their position.
//
// x, y: [T, heads, D] bf16; table: [positions, D] fp32, for each position D/2 cosines and then
// D/2 sines. Row t is at position start + t % seq_len. Arithmetic in fp32, nothing is saved;
// backward is the rotation by the negative angle. y is written (=).
// Least traffic: 4 T heads D bytes in each direction, and 4 T D for the table's rows, which serve
// all heads of a token.

#include "common/pack.cuh"

namespace {

// Heads whose loads are under way together.
constexpr unsigned kHeads = 4;

// Rotates pairs i .. i + N of all heads of row t. With four pairs a warp's accesses are of whole
// sectors, those to the table as well.
template <int N>
__device__ __forceinline__ void rotate(__nv_bfloat16* y, const __nv_bfloat16* x,
                                       const float* table, size_t t, unsigned i, unsigned heads,
                                       unsigned half, unsigned seq_len, unsigned start,
                                       float sign) {
  const float* angles = table + (start + t % seq_len) * 2 * half + i;
  float c[N], s[N];
  load(c, angles);
  load(s, angles + half);
#pragma unroll
  for (int j = 0; j < N; ++j) s[j] *= sign;
  const size_t row = t * heads * 2 * half + i;
  for (unsigned first = 0; first < heads; first += kHeads) {
    float a[kHeads][N], b[kHeads][N];
#pragma unroll
    for (unsigned h = 0; h < kHeads; ++h) {
      if (first + h >= heads) break;
      const size_t at = row + size_t(first + h) * 2 * half;
      load(a[h], x + at);
      load(b[h], x + at + half);
    }
#pragma unroll
    for (unsigned h = 0; h < kHeads; ++h) {
      if (first + h >= heads) break;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float turned = a[h][j] * c[j] - b[h][j] * s[j];
        b[h][j] = b[h][j] * c[j] + a[h][j] * s[j];
        a[h][j] = turned;
      }
      const size_t at = row + size_t(first + h) * 2 * half;
      store(y + at, a[h]);
      store(y + at + half, b[h]);
    }
  }
}

template <int N>
__device__ __forceinline__ void rotate_all(__nv_bfloat16* y, const __nv_bfloat16* x,
                                           const float* table, size_t tokens, unsigned heads,
                                           unsigned half, unsigned seq_len, unsigned start,
                                           float sign) {
  const unsigned chunks = half / N;
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t at = size_t(blockIdx.x) * blockDim.x + threadIdx.x; at < tokens * chunks;
       at += step) {
    rotate<N>(y, x, table, at / chunks, at % chunks * N, heads, half, seq_len, start, sign);
  }
}

}  // namespace

// half = D / 2; sign is 1 forward and -1 backward. A thread for four pairs of a token, in all of
// its heads.
extern "C" __global__ void __launch_bounds__(64)
    rope_bf16(__nv_bfloat16* __restrict__ y, const __nv_bfloat16* __restrict__ x,
              const float* __restrict__ table, size_t tokens, unsigned heads, unsigned half,
              unsigned seq_len, unsigned start, float sign) {
  if (half % kWideFloat == 0) {
    rotate_all<kWideFloat>(y, x, table, tokens, heads, half, seq_len, start, sign);
  } else {
    rotate_all<1>(y, x, table, tokens, heads, half, seq_len, start, sign);
  }
}
