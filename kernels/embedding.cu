// Token embedding: row t of the output is row ids[t] of the table.
//
// ids: [T] u32, each below V (the launcher checks); table: [V, d] bf16; rows, drows: [T, d] bf16;
// dtable: [V, d] fp32, zero before the launch. Backward sums the rows of one id in the order of
// the tokens: the block of an id's first token owns the id's row, so that nothing is added twice
// and the order is fixed. Least traffic: 4 T d bytes forward, 2 T d + 4 V d backward.

#include "common/pack.cuh"

namespace {

template <int N>
__device__ __forceinline__ void copy_row(__nv_bfloat16* to, const __nv_bfloat16* from,
                                         unsigned d) {
  for (unsigned at = threadIdx.x * N; at < d; at += blockDim.x * N) {
    float v[N];
    load(v, from + at);
    store(to + at, v);
  }
}

}  // namespace

// One block a token.
extern "C" __global__ void __launch_bounds__(256)
    embedding_forward_bf16(__nv_bfloat16* __restrict__ rows,
                           const __nv_bfloat16* __restrict__ table,
                           const unsigned* __restrict__ ids, unsigned d) {
  __nv_bfloat16* to = rows + size_t(blockIdx.x) * d;
  const __nv_bfloat16* from = table + size_t(ids[blockIdx.x]) * d;
  if (d % kWide == 0) {
    copy_row<kWide>(to, from, d);
  } else {
    copy_row<1>(to, from, d);
  }
}

// One block a token.
extern "C" __global__ void __launch_bounds__(256)
    embedding_backward_bf16(float* __restrict__ dtable, const __nv_bfloat16* __restrict__ drows,
                            const unsigned* __restrict__ ids, unsigned tokens, unsigned d) {
  const unsigned id = ids[blockIdx.x];
  bool seen = false;
  for (unsigned t = threadIdx.x; t < blockIdx.x; t += blockDim.x) seen |= ids[t] == id;
  if (__syncthreads_or(seen)) return;
  float* row = dtable + size_t(id) * d;
  for (unsigned at = threadIdx.x; at < d; at += blockDim.x) {
    float sum = 0.0f;
    for (unsigned t = blockIdx.x; t < tokens; ++t) {
      if (ids[t] == id) sum += __bfloat162float(drows[size_t(t) * d + at]);
    }
    row[at] = sum;
  }
}
