// Turns of warps of different thread blocks at a place in global memory, counted by an integer there.
#pragma once

#include <cstdint>

namespace flash_attn::ptx {

// Waits until `turn` warps have passed their turn. The read is relaxed, since an acquire empties L1: GPUs do
// not add before the branch that decides on it is taken, and all additions meet in L2.
__device__ __forceinline__ void wait_for_turn(const int32_t* semaphore, int turn) {
  int32_t passed;
  do {
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(passed) : "l"(semaphore) : "memory");
  } while (passed != turn);
  __syncwarp();
}

// Lets the next warp begin, after what this one has added.
__device__ __forceinline__ void pass_turn(int32_t* semaphore) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(semaphore) : "memory");
  }
}

}  // namespace flash_attn::ptx
