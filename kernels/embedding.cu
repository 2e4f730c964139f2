// Token embedding: row t of the output is row ids[t] of the table.
//
// ids: [T] u32, each below V (the launcher checks); table: [V, d] bf16; rows, drows: [T, d] bf16;
// dtable: [V, d] fp32, zero before the launch. Backward takes the tokens grouped by id: one block
// owns an id's row and sums the gradients of its tokens in their order, so that nothing is added
// twice and the order is fixed. Least traffic: 4 T d bytes forward; backward 2 T d, 4 d for each id
// that occurs, and 4 V d for the zeros before.

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

constexpr int kThreads = 256;

// row = the sum of the `count` rows of drows that `tokens` lists.
template <int N>
__device__ __forceinline__ void sum_rows(float* row, const __nv_bfloat16* drows,
                                         const unsigned* tokens, unsigned count, unsigned d) {
  __shared__ unsigned listed[kThreads];
  for (unsigned from = 0; from < d; from += kThreads * N) {
    const unsigned at = from + threadIdx.x * N;
    float sum[N] = {};
    for (unsigned first = 0; first < count; first += kThreads) {
      const unsigned part = min(count - first, unsigned(kThreads));
      __syncthreads();
      if (threadIdx.x < part) listed[threadIdx.x] = tokens[first + threadIdx.x];
      __syncthreads();
      if (at >= d) continue;
#pragma unroll 4
      for (unsigned t = 0; t < part; ++t) {
        float v[N];
        load(v, drows + size_t(listed[t]) * d + at);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += v[i];
      }
    }
    if (at < d) store(row + at, sum);
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

// One block an id. groups: u32, for each id that occurs where its tokens begin in `tokens`, and
// after the last one T; tokens: [T] u32, those of one id together and ascending.
extern "C" __global__ void __launch_bounds__(kThreads)
    embedding_backward_bf16(float* __restrict__ dtable, const __nv_bfloat16* __restrict__ drows,
                            const unsigned* __restrict__ ids,
                            const unsigned* __restrict__ groups,
                            const unsigned* __restrict__ tokens, unsigned d) {
  __shared__ unsigned first, count, id;
  if (threadIdx.x == 0) {
    first = groups[blockIdx.x];
    count = groups[blockIdx.x + 1] - first;
    id = ids[tokens[first]];
  }
  __syncthreads();
  float* row = dtable + size_t(id) * d;
  if (d % kWideFloat == 0) {
    sum_rows<kWideFloat>(row, drows, tokens + first, count, d);
  } else {
    sum_rows<1>(row, drows, tokens + first, count, d);
  }
}
