// Cross-entropy of rows of logits and its gradient:
//   loss_t = log sum_v exp(l_tv) - l_t,y
//   dlogits = scale (softmax(l_t) - onehot(y_t)), written (=)
//
// logits: [T, V] fp32; targets: [T] u32, each below V; losses: fp32, written from `first` on;
// dlogits: [T, V] bf16, or null where no gradient is wanted, memory of its own as in kl_div.cu.
// Arithmetic in fp32, nothing is saved. Tokens that do not count are not among the rows.
// Least traffic: 10 T V bytes, each logit read twice as in kl_div.cu; 4 T V without a gradient.
//
// Backward: row t of dx = grad saved[row_of[t]], or zero where row_of[t] is kNoRow; saved: [n, d]
// fp32, row_of: [T] u32, dx: [T, d] bf16, written (=). 4 n d + 2 T d bytes.

#include "common/pack.cuh"
#include "common/softmax.cuh"

namespace {

using softmax::kThreads;

constexpr unsigned kNoRow = 0xffffffffu;

template <int N>
__device__ __forceinline__ float log_sum_exp(const float* row, unsigned vocab) {
  __shared__ softmax::Stats partial[kThreads / 32];
  softmax::Stats stats = softmax::kNone;
  for (unsigned at = threadIdx.x * N; at < vocab; at += kThreads * N) {
    float v[N];
    load(v, row + at);
    softmax::add(stats, v);
  }
  return softmax::log_sum_exp(stats, partial);
}

template <int N>
__device__ __forceinline__ void gradient(__nv_bfloat16* dlogits, const float* row, float log_sum,
                                         unsigned target, unsigned vocab, float scale) {
  for (unsigned at = threadIdx.x * N; at < vocab; at += kThreads * N) {
    float v[N];
    load(v, row + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = scale * (__expf(v[i] - log_sum) - (at + i == target ? 1.0f : 0.0f));
    }
    store(dlogits + at, v);
  }
}

template <int N>
__device__ __forceinline__ void scale(__nv_bfloat16* dx, const float* saved, unsigned d,
                                      float grad) {
  for (unsigned at = threadIdx.x * N; at < d; at += blockDim.x * N) {
    float v[N] = {};
    if (saved != nullptr) load(v, saved + at);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] *= grad;
    store(dx + at, v);
  }
}

}  // namespace

// One block a token.
extern "C" __global__ void __launch_bounds__(kThreads)
    cross_entropy_forward_f32(float* __restrict__ losses, __nv_bfloat16* __restrict__ dlogits,
                              const float* __restrict__ logits,
                              const unsigned* __restrict__ targets, unsigned first,
                              unsigned vocab, float scale) {
  const size_t at = size_t(blockIdx.x) * vocab;
  const float* row = logits + at;
  const unsigned target = targets[blockIdx.x];
  const bool wide = vocab % kWideFloat == 0;
  const float log_sum =
      wide ? log_sum_exp<kWideFloat>(row, vocab) : log_sum_exp<1>(row, vocab);
  if (threadIdx.x == 0) losses[first + blockIdx.x] = log_sum - row[target];
  if (dlogits == nullptr) return;
  if (wide) {
    gradient<kWideFloat>(dlogits + at, row, log_sum, target, vocab, scale);
  } else {
    gradient<1>(dlogits + at, row, log_sum, target, vocab, scale);
  }
}

// One block a token.
extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_backward_bf16(__nv_bfloat16* __restrict__ dx, const float* __restrict__ saved,
                                const unsigned* __restrict__ row_of, unsigned d, float grad) {
  const unsigned row = row_of[blockIdx.x];
  const float* from = row == kNoRow ? nullptr : saved + size_t(row) * d;
  __nv_bfloat16* to = dx + size_t(blockIdx.x) * d;
  if (d % kWideFloat == 0) {
    scale<kWideFloat>(to, from, d, grad);
  } else {
    scale<1>(to, from, d, grad);
  }
}
