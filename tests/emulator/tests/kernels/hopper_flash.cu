// Causal flash attention of one head of 64 channels in bf16 for Hopper: TMA brings 64 keys and
// values at a time into two stages, one warpgroup multiplies for 64 queries with wgmma.
#include "hopper.cuh"

constexpr int D = 64, TILE = 64, BYTES = TILE * D * 2;

#define REGISTERS                                                                                             \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31}"
#define ALL(d) ACC_OF(d, 0), ACC_OF(d, 8), ACC_OF(d, 16), ACC_OF(d, 24)
#define ACC_OF(d, i)                                                                                   \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])

// S = Q K^T for 16 channels, added to what S holds if `keep`.
__device__ __forceinline__ void scores(float *s, uint64_t q, uint64_t k, int keep) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS
               ", %32, %33, p, 1, 1, 0, 0;}"
               : ALL(s)
               : "l"(q), "l"(k), "r"(keep));
}
// O += P V for 16 keys: P in registers, V's rows are keys.
__device__ __forceinline__ void values(float *o, const uint32_t *p, uint64_t v) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : ALL(o)
               : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
__device__ __forceinline__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void product_wait() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ __forceinline__ float over_quad(float x, bool max) {
  for (int i = 1; i < 4; i *= 2) {
    float other = __shfl_xor_sync(~0u, x, i);
    x = max ? fmaxf(x, other) : x + other;
  }
  return x;
}

extern "C" __global__ void __launch_bounds__(128)
    flash_hopper(const __grid_constant__ CUtensorMap Q, const __grid_constant__ CUtensorMap K,
                 const __grid_constant__ CUtensorMap V, __nv_bfloat16 *out, int time, float scale) {
  __shared__ __align__(1024) uint8_t memory[5 * BYTES];
  __shared__ __align__(8) uint64_t ready[2];
  uint32_t q = shared_address(memory), k = q + BYTES, v = k + 2 * BYTES;
  int t = threadIdx.x, lane = t & 31, first = blockIdx.x * TILE, tiles = blockIdx.x + 1;
  auto load = [&](int i) {
    uint32_t barrier = shared_address(ready + i % 2);
    barrier_expect(barrier, (i == 0 ? 3 : 2) * BYTES);
    if (i == 0) load_tile(q, &Q, barrier, 0, first);
    load_tile(k + i % 2 * BYTES, &K, barrier, 0, i * TILE);
    load_tile(v + i % 2 * BYTES, &V, barrier, 0, i * TILE);
  };
  if (t == 0) {
    barrier_init(shared_address(ready), 1), barrier_init(shared_address(ready + 1), 1);
    asm volatile("fence.mbarrier_init.release.cluster;");
    load(0);
  }
  float o[32] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int i = 0; i < tiles; i++) {
    __syncthreads();  // all have read the stage that is filled next
    if (t == 0 && i + 1 < tiles) load(i + 1);
    barrier_wait(shared_address(ready + i % 2), i / 2 & 1);
    float s[32];
    product_fence();
#pragma unroll
    for (int c = 0; c < 4; c++)
      scores(s, descriptor(q) + 2 * c, descriptor(k + i % 2 * BYTES) + 2 * c, c > 0);
    product_wait();
    uint32_t p[16];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = first + t / 32 * 16 + lane / 4 + 8 * half;
      float most = largest[half];
#pragma unroll
      for (int e = 0; e < 32; e++) {
        if (e / 2 % 2 != half) continue;
        int key = i * TILE + e / 4 * 8 + 2 * (lane % 4) + e % 2;
        s[e] = key <= row ? s[e] * scale : -INFINITY;
        most = fmaxf(most, s[e]);
      }
      most = over_quad(most, true);
      float rescale = exp2f(largest[half] - most), sum = 0;
#pragma unroll
      for (int e = 0; e < 32; e++) {
        if (e / 2 % 2 != half) continue;
        s[e] = exp2f(s[e] - most);
        sum += s[e];
        o[e] *= rescale;
      }
      total[half] = total[half] * rescale + over_quad(sum, false);
      largest[half] = most;
    }
#pragma unroll
    for (int e = 0; e < 16; e++) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(s[2 * e], s[2 * e + 1]);
      p[e] = *(uint32_t *)&pair;
    }
    product_fence();
#pragma unroll
    for (int c = 0; c < 4; c++) values(o, p + 4 * c, descriptor(v + i % 2 * BYTES) + c * (16 * 128 >> 4));
    product_wait();
  }
#pragma unroll
  for (int e = 0; e < 32; e += 2) {
    int half = e / 2 % 2, row = first + t / 32 * 16 + lane / 4 + 8 * half;
    if (row < time)
      *(__nv_bfloat162 *)(out + row * D + e / 4 * 8 + 2 * (lane % 4)) =
          __floats2bfloat162_rn(o[e] / total[half], o[e + 1] / total[half]);
  }
}
