// Products of a warpgroup (128 threads) with bf16 operands in shared memory and fp32 accumulators
// (wgmma, sm_90a). Operands lie in blocks of 64 x 64 values as copies with the 128-byte swizzle
// leave them: 64 rows of 128 bytes, 16-byte chunks permuted by the row, 8 KiB in all, at
// multiples of 1 KiB. The rows run along K (K-major) or across it (MN-major).
#pragma once

#include <cstdint>

constexpr unsigned kWarpgroup = 128;
constexpr unsigned kBlock = 64;
constexpr unsigned kBlockBytes = kBlock * kBlock * 2;

// What the instruction needs to know of an operand that begins at `address`; after the matrix
// descriptor of the PTX ISA. Along K eight rows are 1 KiB and further blocks continue them; across
// K eight rows, of K, are 1 KiB too, and the next 64 of the extent kBlocks blocks on.
template <bool kAlongK, unsigned kBlocks = 1>
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t address) {
  constexpr uint64_t kLeading = kAlongK ? 1 : kBlocks * kBlockBytes / 16, kStride = 1024 / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return kSwizzle128 << 62 | kStride << 32 | kLeading << 16 | (address & 0x3ffff) / 16;
}

// What to add to a descriptor to go on by 16 values of K.
template <bool kAlongK>
constexpr uint64_t kNextK = kAlongK ? 32 / 16 : 16 * 128 / 16;

// Before the first product after other accesses to its accumulators.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends the group of all products since the last call.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kPending` groups are still under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses to accumulators across this point: it does not know that
// a product ends at wgmma_wait.
template <int kFragments>
__device__ __forceinline__ void hold(float (&acc)[kFragments][4]) {
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    asm volatile("" : "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])::"memory");
  }
}

// Gives registers of this warpgroup back until its threads have kCount, or waits until they have.
template <int kCount>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Waits for the warpgroup's threads.
__device__ __forceinline__ void warpgroup_sync(unsigned group) {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kWarpgroup) : "memory");
}

// Taken from one lane, so that the compiler knows it to be the same in a warp.
__device__ __forceinline__ unsigned uniform(unsigned x) { return __shfl_sync(0xffffffff, x, 0); }

// What the instructions below have in common: the names of 32 accumulators in assembly, and 4 or
// 32 accumulators as its operands.
#define WGMMA_SUMS_0 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_SUMS_32 \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_SUMS_64 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_FRAGMENT(j) \
  "+f"(acc[j][0]), "+f"(acc[j][1]), "+f"(acc[j][2]), "+f"(acc[j][3])
#define WGMMA_FRAGMENTS(j)                                                          \
  WGMMA_FRAGMENT(j), WGMMA_FRAGMENT(j + 1), WGMMA_FRAGMENT(j + 2), WGMMA_FRAGMENT(j + 3), \
      WGMMA_FRAGMENT(j + 4), WGMMA_FRAGMENT(j + 5), WGMMA_FRAGMENT(j + 6), WGMMA_FRAGMENT(j + 7)

// acc += A B, 64 x 64 over 16 values of K, for the descriptors of A and B. A warp has 16 of the
// rows; its lanes hold them as in mma.cuh. The sum is there after wgmma_wait.
// Without kAdd, acc is overwritten.
template <bool kLhsAlongK, bool kRhsAlongK, bool kAdd = true>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[8][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      WGMMA_SUMS_0
      "}, %32, %33, %36, 1, 1, %34, %35;"
      : WGMMA_FRAGMENTS(0)
      : "l"(a), "l"(b), "n"(kLhsAlongK ? 0 : 1), "n"(kRhsAlongK ? 0 : 1), "n"(kAdd ? 1 : 0));
}

// The same for 64 x 128.
template <bool kLhsAlongK, bool kRhsAlongK, bool kAdd = true>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      WGMMA_SUMS_0 ", "
      WGMMA_SUMS_32
      "}, %64, %65, %68, 1, 1, %66, %67;"
      : WGMMA_FRAGMENTS(0), WGMMA_FRAGMENTS(8)
      : "l"(a), "l"(b), "n"(kLhsAlongK ? 0 : 1), "n"(kRhsAlongK ? 0 : 1), "n"(kAdd ? 1 : 0));
}

// The same for 64 x 192.
template <bool kLhsAlongK, bool kRhsAlongK, bool kAdd = true>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[24][4], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      WGMMA_SUMS_0 ", "
      WGMMA_SUMS_32 ", "
      WGMMA_SUMS_64
      "}, %96, %97, %100, 1, 1, %98, %99;"
      : WGMMA_FRAGMENTS(0), WGMMA_FRAGMENTS(8), WGMMA_FRAGMENTS(16)
      : "l"(a), "l"(b), "n"(kLhsAlongK ? 0 : 1), "n"(kRhsAlongK ? 0 : 1), "n"(kAdd ? 1 : 0));
}

// acc += A B, 64 x 64 over 16 values of K, with A in registers as mma.cuh's fragments, which must
// not change before wgmma_wait.
template <bool kRhsAlongK>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[8][4], const uint32_t (&a)[4],
                                           uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      WGMMA_SUMS_0
      "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
      : WGMMA_FRAGMENTS(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRhsAlongK ? 0 : 1));
}

// The same for 64 x 128.
template <bool kRhsAlongK>
__device__ __forceinline__ void wgmma_bf16(float (&acc)[16][4], const uint32_t (&a)[4],
                                           uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      WGMMA_SUMS_0 ", "
      WGMMA_SUMS_32
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
      : WGMMA_FRAGMENTS(0), WGMMA_FRAGMENTS(8)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kRhsAlongK ? 0 : 1));
}

#undef WGMMA_FRAGMENTS
#undef WGMMA_FRAGMENT
#undef WGMMA_SUMS_0
#undef WGMMA_SUMS_32
#undef WGMMA_SUMS_64
