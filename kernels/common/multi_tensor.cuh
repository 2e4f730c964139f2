// Many fp32 tensors in one launch: a table says which block works on which part of which tensor
// (as Apex's multi_tensor_apply does), and a sweep applies an optimizer's rule to each value.
#pragma once

#include <cstdint>

#include "pack.cuh"
#include "reduce.cuh"

namespace multi_tensor {

constexpr int kThreads = 256;
// Values that a block works on, unless the tensor goes row by row.
constexpr unsigned kSpan = 8192;

// One tensor: value, gradient, up to two states, all [len]; row is the length of a row where each
// row is a unit vector, else 0.
struct Tensor {
  float* value;
  const float* grad;
  float* state[2];
  uint64_t len;
  uint64_t row;
};

// What a block works on: `n` values from the pointers on, of which the first `wide` lie at
// multiples of 16 bytes.
struct Part {
  float* value;
  const float* grad;
  float* state[2];
  unsigned n;
  unsigned wide;
  bool unit_row;
};

__device__ __forceinline__ Part part_at(const Tensor& tensor, uint64_t block) {
  const bool unit_row = tensor.row != 0;
  const uint64_t span = unit_row ? tensor.row : kSpan;
  const uint64_t at = block * span;
  const unsigned n = unsigned(min(span, tensor.len - at));
  // A row may begin anywhere unless all are whole 16-byte accesses.
  const unsigned wide = unit_row && n % kWideFloat != 0 ? 0 : n / kWideFloat * kWideFloat;
  return {tensor.value + at,
          tensor.grad + at,
          {tensor.state[0] + at, tensor.state[1] + at},
          n,
          wide,
          unit_row};
}

// `table`: the number of each tensor's first block and, last, the number of all blocks
// (count + 1 words of 64 bits), then the tensors, of which those without values have no block.
// The thread that finds the block's tensor reads it for all.
__device__ __forceinline__ Part part_of(const uint64_t* table, unsigned count) {
  __shared__ Part part;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) {
    if (table[i] <= blockIdx.x && blockIdx.x < table[i + 1]) {
      part = part_at(reinterpret_cast<const Tensor*>(table + count + 1)[i], blockIdx.x - table[i]);
    }
  }
  __syncthreads();
  return part;
}

// The first `kept` values of a row and of its gradient in shared memory: each thread reads back
// only what it put there itself. Longer rows are read from memory twice.
struct Row {
  float* value;
  float* grad;
  unsigned kept;
};

template <int N>
__device__ __forceinline__ float product(const Part& part, const Row& row, unsigned from,
                                         unsigned to) {
  float sum = 0.0f;
  for (unsigned at = from + threadIdx.x * N; at < to; at += kThreads * N) {
    float w[N], g[N];
    load(w, part.value + at);
    load(g, part.grad + at);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += g[i] * w[i];
    if (at < row.kept) {
      store(row.value + at, w);
      store(row.grad + at, g);
    }
  }
  return sum;
}

template <int N, class Rule>
__device__ __forceinline__ void apply(const Part& part, const Row& row, float along,
                                      const Rule& rule, unsigned from, unsigned to) {
  for (unsigned at = from + threadIdx.x * N; at < to; at += kThreads * N) {
    float w[N], g[N], state[Rule::kStates][N];
    const bool kept = at < row.kept;
    load(w, (kept ? row.value : part.value) + at);
    load(g, (kept ? row.grad : part.grad) + at);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) load(state[s], part.state[s] + at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float values[Rule::kStates];
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) values[s] = state[s][i];
      rule(w[i], g[i] - along * w[i], values);
#pragma unroll
      for (int s = 0; s < Rule::kStates; ++s) state[s][i] = values[s];
    }
    store(part.value + at, w);
#pragma unroll
    for (int s = 0; s < Rule::kStates; ++s) store(part.state[s] + at, state[s]);
  }
}

// Applies `rule(value, gradient, states)` to each value. Where the tensor's rows w are unit
// vectors, the gradient g of each is first freed of its part along w: g - <g, w> w. The block
// has 2 `kept` floats of dynamic shared memory, `kept` a multiple of kWideFloat.
template <class Rule>
__device__ __forceinline__ void sweep(const uint64_t* table, unsigned count, unsigned kept,
                                      const Rule& rule) {
  extern __shared__ float4 shared[];
  __shared__ float partial[kThreads / 32];
  const Part part = part_of(table, count);
  float* buffer = reinterpret_cast<float*>(shared);
  Row row = {buffer, buffer + kept, 0};
  float along = 0.0f;
  if (part.unit_row) {
    row.kept = kept;
    const float sum = product<kWideFloat>(part, row, 0, part.wide) +
                      product<1>(part, row, part.wide, part.n);
    along = block_sum(sum, partial);
  }
  apply<kWideFloat>(part, row, along, rule, 0, part.wide);
  apply<1>(part, row, along, rule, part.wide, part.n);
}

}  // namespace multi_tensor
