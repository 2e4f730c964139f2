// Sign descent (Bernstein et al. 2018, arXiv 1802.04434) under schedule-free averaging (Defazio
// et al. 2024, arXiv 2405.15682) over all parameters in one launch. With the average
// x = y + (1 - 1/beta) (z - y), which is not stored, and share = 1/n at step n:
//   z -= lr sign(g),  x = z - (1 - share) (z - x),  y = x + (1 - beta) (z - x)
//
// table: the tensors as kernels/common/multi_tensor.cuh lays them out: y, g, z, each [len] fp32,
// aligned to 16 bytes; y and z are written (=). Where the rows of y are unit vectors, the part of
// g along each is taken out on the way; g itself stays. sign(0) = 0.
// Least traffic: 20 bytes a value, y and z once in and once out and g once in.

#include "common/multi_tensor.cuh"

namespace {

struct Signum {
  static constexpr int kStates = 1;
  // 1 - 1/beta, 1 - share, 1 - beta
  float lr, to_x, rest, to_y;

  __device__ __forceinline__ void operator()(float& y, float g, float (&state)[kStates]) const {
    float& z = state[0];
    const float before = y + to_x * (z - y);
    z -= lr * (float(g > 0.0f) - float(g < 0.0f));
    // From z's side: exact in the first step, where the average is z.
    const float x = z - rest * (z - before);
    y = x + to_y * (z - x);
  }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(multi_tensor::kThreads)
    signum_f32(const uint64_t* __restrict__ table, unsigned count, unsigned kept, float lr,
               float to_x, float rest, float to_y) {
  const Signum rule = {lr, to_x, rest, to_y};
  multi_tensor::sweep(table, count, kept, rule);
}
