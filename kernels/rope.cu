// Rotary position embedding (Su et al. 2021, arXiv 2104.09864), rotate-half layout: values i and
// i + D/2 of a head turn together by the angle of their position.
//
// x, y: [T, heads, D] bf16; table: [positions, D] fp32, for each position D/2 cosines and then
// D/2 sines. Row t is at position start + t % seq_len. Arithmetic in fp32, nothing is saved;
// backward is the rotation by the negative angle. y is written (=).
// Least traffic: 4 T heads D bytes in each direction, and the table's rows once.

#include "common/pack.cuh"

namespace {

// Rotates the N pairs that start at number `pair` of all pairs.
template <int N>
__device__ __forceinline__ void rotate(__nv_bfloat16* y, const __nv_bfloat16* x,
                                       const float* table, size_t pair, unsigned heads,
                                       unsigned half, unsigned seq_len, unsigned start,
                                       float sign) {
  const size_t head = pair / half;
  const unsigned i = pair % half;
  const unsigned position = start + unsigned(head / heads % seq_len);
  const float* cosines = table + size_t(position) * 2 * half + i;
  const float* sines = cosines + half;
  const size_t at = head * 2 * half + i;
  float a[N], b[N];
  load(a, x + at);
  load(b, x + at + half);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float c = cosines[j], s = sign * sines[j];
    const float turned = a[j] * c - b[j] * s;
    b[j] = b[j] * c + a[j] * s;
    a[j] = turned;
  }
  store(y + at, a);
  store(y + at + half, b);
}

template <int N>
__device__ __forceinline__ void rotate_all(__nv_bfloat16* y, const __nv_bfloat16* x,
                                           const float* table, size_t pairs, unsigned heads,
                                           unsigned half, unsigned seq_len, unsigned start,
                                           float sign) {
  const size_t step = size_t(gridDim.x) * blockDim.x * N;
  size_t pair = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (; pair < pairs; pair += step) {
    rotate<N>(y, x, table, pair, heads, half, seq_len, start, sign);
  }
}

}  // namespace

// pairs = T heads D / 2, half = D / 2; sign is 1 forward and -1 backward.
extern "C" __global__ void __launch_bounds__(256)
    rope_bf16(__nv_bfloat16* __restrict__ y, const __nv_bfloat16* __restrict__ x,
              const float* __restrict__ table, size_t pairs, unsigned heads, unsigned half,
              unsigned seq_len, unsigned start, float sign) {
  if (half % kWide == 0) {
    rotate_all<kWide>(y, x, table, pairs, heads, half, seq_len, start, sign);
  } else {
    rotate_all<1>(y, x, table, pairs, heads, half, seq_len, start, sign);
  }
}
