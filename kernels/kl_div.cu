// Kullback-Leibler divergence of two rows of logits and its gradient:
//   loss_t = sum_v p (log p - log q),  p = softmax(teacher_t), q = softmax(student_t)
//   dlogits = q - p, written (=)
//
// logits: [2 T, V] fp32, the teacher's rows and then the student's; losses: fp32, written from
// `first` on; dlogits: [T, V] bf16, or null where no gradient is wanted. Arithmetic in fp32,
// nothing is saved. The gradient has memory of its own, because the matrix product that follows
// takes rows that lie one behind the other, and writing those over the fp32 logits would hit rows
// that other blocks still read.
// Least traffic: 18 T V bytes (16 T V without a gradient). Every logit is read twice, for the
// statistics and then for the result, since a row of a large vocabulary is more than a
// multiprocessor's memory holds.
//
// Backward: dx_t = grad_t saved_t; saved: [T, d] fp32, grad: [T] fp32, dx: [T, d] bf16, written
// (=). 6 T d bytes.

#include "common/pack.cuh"
#include "common/reduce.cuh"
#include "common/softmax.cuh"

namespace {

using softmax::kThreads;

template <int N>
__device__ __forceinline__ float divergence(const float* p_row, const float* q_row,
                                            __nv_bfloat16* dlogits, unsigned vocab) {
  __shared__ softmax::Stats partial[2][kThreads / 32];
  softmax::Stats p_stats = softmax::kNone, q_stats = softmax::kNone;
  for (unsigned at = threadIdx.x * N; at < vocab; at += kThreads * N) {
    float p[N], q[N];
    load(p, p_row + at);
    load(q, q_row + at);
    softmax::add(p_stats, p);
    softmax::add(q_stats, q);
  }
  const float p_log_sum = softmax::log_sum_exp(p_stats, partial[0]);
  const float q_log_sum = softmax::log_sum_exp(q_stats, partial[1]);
  float sum = 0.0f;
  for (unsigned at = threadIdx.x * N; at < vocab; at += kThreads * N) {
    float p[N], q[N];
    load(p, p_row + at);
    load(q, q_row + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float log_p = p[i] - p_log_sum, log_q = q[i] - q_log_sum;
      const float probability = __expf(log_p);
      sum += probability * (log_p - log_q);
      q[i] = __expf(log_q) - probability;
    }
    if (dlogits != nullptr) store(dlogits + at, q);
  }
  return sum;
}

template <int N>
__device__ __forceinline__ void scale(__nv_bfloat16* dx, const float* saved, unsigned d,
                                      float grad) {
  for (unsigned at = threadIdx.x * N; at < d; at += blockDim.x * N) {
    float v[N];
    load(v, saved + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= grad;
    store(dx + at, v);
  }
}

}  // namespace

// One block a token; T of them.
extern "C" __global__ void __launch_bounds__(kThreads)
    kl_div_forward_f32(float* __restrict__ losses, __nv_bfloat16* __restrict__ dlogits,
                       const float* __restrict__ logits, unsigned first, unsigned vocab) {
  __shared__ float partial[kThreads / 32];
  const size_t at = size_t(blockIdx.x) * vocab;
  const float* p = logits + at;
  const float* q = p + size_t(gridDim.x) * vocab;
  __nv_bfloat16* row = dlogits == nullptr ? nullptr : dlogits + at;
  const float sum = vocab % kWideFloat == 0 ? divergence<kWideFloat>(p, q, row, vocab)
                                            : divergence<1>(p, q, row, vocab);
  const float loss = block_sum(sum, partial);
  if (threadIdx.x == 0) losses[first + blockIdx.x] = loss;
}

// One block a token.
extern "C" __global__ void __launch_bounds__(256)
    kl_div_backward_bf16(__nv_bfloat16* __restrict__ dx, const float* __restrict__ saved,
                         const float* __restrict__ grads, unsigned d) {
  const size_t at = size_t(blockIdx.x) * d;
  const float grad = grads[blockIdx.x];
  if (d % kWideFloat == 0) {
    scale<kWideFloat>(dx + at, saved + at, d, grad);
  } else {
    scale<1>(dx + at, saved + at, d, grad);
  }
}
