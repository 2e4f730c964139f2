// AdamW (Kingma and Ba 2014, arXiv 1412.6980; Loshchilov and Hutter 2017, arXiv 1711.05101) over
// all parameters in one launch:
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
//   w = w decay - step_size m / (sqrt(v) / root_correction + eps)
// with decay = 1 - lr weight_decay, step_size = lr / (1 - beta1^n), root_correction =
// sqrt(1 - beta2^n) at step n.
//
// table: the tensors as kernels/common/multi_tensor.cuh lays them out: w, g, m, v, each [len]
// fp32, aligned to 16 bytes; all but g are written (=). Where the rows of w are unit vectors, the
// part of g along each is taken out on the way; g itself stays.
// Least traffic: 28 bytes a value, each of w, m, v once in and once out and g once in.

#include "common/multi_tensor.cuh"

namespace {

struct AdamW {
  static constexpr int kStates = 2;
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps;

  __device__ __forceinline__ void operator()(float& w, float g, float (&state)[kStates]) const {
    float& m = state[0];
    float& v = state[1];
    m += one_minus_beta1 * (g - m);
    v = beta2 * v + one_minus_beta2 * g * g;
    const float denominator = sqrtf(v) / root_correction + eps;
    w = w * decay - step_size * (m / denominator);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(multi_tensor::kThreads)
    adamw_f32(const uint64_t* __restrict__ table, unsigned count, unsigned kept, float decay,
              float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,
              float root_correction, float eps) {
  const AdamW rule = {decay,     one_minus_beta1, beta2, one_minus_beta2,
                      step_size, root_correction, eps};
  multi_tensor::sweep(table, count, kept, rule);
}
