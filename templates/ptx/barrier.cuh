// Barriers of a thread block: named ones (bar), which warps meet at, and in shared memory (mbarrier, sm_90),
// which count arrivals and the bytes of asynchronous copies.
#pragma once

#include <cstdint>

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

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to asynchronous copies; __syncthreads() does so for the other threads.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and lets the phase wait for `bytes` more bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity is complete. A fresh barrier is in phase 0: waiting for parity 1
// returns at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

}  // namespace flash_attn::ptx
