// The common norm of many gradients, and their scaling, each in one launch.
//
// table: the tensors as kernels/common/multi_tensor.cuh lays them out, the gradients as values,
// fp32, aligned to 16 bytes. Sums are in fp64, in an order that depends on nothing but the sizes.
// Least traffic: 4 bytes a value for the norm, 8 for the scaling.

#include "common/multi_tensor.cuh"

namespace {

using multi_tensor::kThreads;

template <int N>
__device__ __forceinline__ double squares(const float* values, unsigned from, unsigned to) {
  double sum = 0.0;
  for (unsigned at = from + threadIdx.x * N; at < to; at += kThreads * N) {
    float v[N];
    load(v, values + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += double(v[i]) * double(v[i]);
  }
  return sum;
}

template <int N>
__device__ __forceinline__ void scale(float* values, float factor, unsigned from, unsigned to) {
  for (unsigned at = from + threadIdx.x * N; at < to; at += kThreads * N) {
    float v[N];
    load(v, values + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= factor;
    store(values + at, v);
  }
}

}  // namespace

// sums: one fp64 for each block.
extern "C" __global__ void __launch_bounds__(kThreads)
    clip_squares_f32(double* __restrict__ sums, const uint64_t* __restrict__ table,
                     unsigned count) {
  __shared__ double partial[kThreads / 32];
  const multi_tensor::Part part = multi_tensor::part_of(table, count);
  const double sum = squares<kWideFloat>(part.value, 0, part.wide) +
                     squares<1>(part.value, part.wide, part.n);
  const double total = block_sum(sum, partial);
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

// One block: the sum of all `count` sums.
extern "C" __global__ void __launch_bounds__(kThreads)
    clip_total_f64(double* __restrict__ total, const double* __restrict__ sums, unsigned count) {
  __shared__ double partial[kThreads / 32];
  double sum = 0.0;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) sum += sums[i];
  sum = block_sum(sum, partial);
  if (threadIdx.x == 0) *total = sum;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    clip_scale_f32(const uint64_t* __restrict__ table, unsigned count, float factor) {
  const multi_tensor::Part part = multi_tensor::part_of(table, count);
  scale<kWideFloat>(part.value, factor, 0, part.wide);
  scale<1>(part.value, factor, part.wide, part.n);
}
