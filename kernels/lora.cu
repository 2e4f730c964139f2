// Dropout of an adapter's inputs (Hu et al. 2021, arXiv 2106.09685): half i % 2, lower first, of
// word i / 2 of the stream decides on element i, which is kept where it is not below the threshold.
//
// x, dropped: [n] bf16, 16-byte aligned; mask: bit i % 8 of byte i / 8 is set where element i is
// kept, or null. What is kept is not scaled: the factor is left to the products, which apply it in
// fp32. step: null, or two words that stand for high1 and high2. n / 8 threads rounded
// up. Least traffic: 4 n bytes, and n / 8 for the mask.

#include "common/pack.cuh"
#include "common/philox.cuh"

extern "C" __global__ void lora_dropout_bf16(__nv_bfloat16* __restrict__ dropped,
                                             uint8_t* __restrict__ mask,
                                             const __nv_bfloat16* __restrict__ x, uint64_t n,
                                             uint32_t key0, uint32_t key1, uint32_t high0,
                                             uint32_t high1, uint32_t high2,
                                             const uint32_t* __restrict__ step,
                                             uint32_t threshold) {
  const uint64_t thread = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint64_t at = thread * kWide;
  if (at >= n) return;
  const Stream stream{key0, key1, high0, step ? step[0] : high1, step ? step[1] : high2};
  const uint32_t kept = stream.kept(uint32_t(thread), threshold);
  if (mask) mask[thread] = uint8_t(kept);
  if (at + kWide <= n) {
    float v[kWide];
    load(v, x + at);
#pragma unroll
    for (int i = 0; i < kWide; ++i) v[i] = kept >> i & 1 ? v[i] : 0.0f;
    store(dropped + at, v);
  } else {
    for (uint64_t i = at; i < n; ++i) {
      dropped[i] = kept >> (i - at) & 1 ? x[i] : __float2bfloat16_rn(0.0f);
    }
  }
}
