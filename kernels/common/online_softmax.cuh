// Softmax of rows whose scores come in steps (online softmax, Milakov and Gimelshein 2018, arXiv
// 1805.02867), in base 2, for scores and sums as accumulators hold them.
#pragma once

#include "attention.cuh"

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Online softmax of M x 16 rows, each spread over the four lanes of a quad.
template <int M>
struct Softmax {
  // Largest score of a row so far, and this lane's part of the sum of 2^(scale (score - it)).
  float largest[M][2], sum[M][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; ++m) {
      largest[m][0] = largest[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.0f;
    }
  }

  // Turns scores into 2^(scale (score - maximum)) and brings sum and o to the new maximum.
  template <int N, int kColumns>
  __device__ __forceinline__ void step(float (&p)[M][N][4], float (&o)[M][kColumns][4],
                                       float scale) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float high = largest[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          high = fmaxf(high, fmaxf(p[m][n][2 * half], p[m][n][2 * half + 1]));
        }
        high = quad_max(high);
        // A row that has seen nothing yet has no maximum to subtract.
        const float base = high == -INFINITY ? 0.0f : high * scale;
        const float shrink = exp2_approximate(largest[m][half] * scale - base);
        largest[m][half] = high;
        float total = sum[m][half] * shrink;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            p[m][n][j] = exp2_approximate(p[m][n][j] * scale - base);
            total += p[m][n][j];
          }
        }
        sum[m][half] = total;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          o[m][n][2 * half] *= shrink;
          o[m][n][2 * half + 1] *= shrink;
        }
      }
    }
  }

  // Divides o by the sums and writes the rows' logarithms to log_sum[row].
  template <int kColumns>
  __device__ __forceinline__ void finish(float (&o)[M][kColumns][4], float scale, float* log_sum,
                                         unsigned first, unsigned rows) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(sum[m][half]);
        const unsigned row = first + row_of(m, half);
        if (threadIdx.x % 4 == 0 && row < rows) {
          log_sum[row] = largest[m][half] * scale + __log2f(total);
        }
        const float inverse = __fdividef(1.0f, total);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          o[m][n][2 * half] *= inverse;
          o[m][n][2 * half + 1] *= inverse;
        }
      }
    }
  }
};
