// Named barriers: synchronisation of some of a thread block's warps.
#pragma once

namespace flash_attn::ptx {

// Waits for `threads` threads at barrier `id` (1..15; 0 belongs to __syncthreads). Orders their shared memory
// accesses.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as `threads` threads' arrival at barrier `id`, together with those that wait there, without waiting.
// For racecheck FLASH_ATTN_RACECHECK makes it wait: see docs/kernels.md.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef FLASH_ATTN_RACECHECK
  barrier_sync(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace flash_attn::ptx
