// Copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 on).
#pragma once

#include <cstdint>

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) to 16 bytes of shared memory and sets the rest of them to zero. Both
// addresses must be multiples of 16, and `from` valid even where bytes is 0.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, unsigned bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}

// Ends the group of all copies since the last call.
__device__ __forceinline__ void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Copies 4 bytes, or sets them to zero where `valid` is false.
__device__ __forceinline__ void copy_async_word(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}
