// What goes with wgmma (sm_90a): operand descriptors, ordering, and the registers of a warpgroup.
//
// A batch of wgmmas runs while the warpgroup goes on:
//   fence; wgmma ..; commit; (other work) ; wait<n>; settle(accumulator)
// Between its first wgmma and the wait nobody touches the batch's registers.
#pragma once

#include <cstdint>

namespace flash_attn::ptx {

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kPending of the committed batches are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of an accumulator across this point, which a wait alone does not.
template <int kTiles>
__device__ __forceinline__ void settle(float (&accumulator)[1][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 4; ++c) asm volatile("" : "+f"(accumulator[0][n][c])::"memory");
  }
}

// Makes this thread's ordinary writes to shared memory visible to wgmma and to bulk copies.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Shared memory operands are stored in slabs of 64 columns, rows of 128 bytes whose 16-byte chunks are
// permuted (128-byte swizzle), 8 rows to 1024 bytes. `slab_bytes` is the distance between slabs, which the
// hardware uses when the operand's rows run along K (V); a K-major operand (Q, K) stays in one slab.
// Advancing by n bytes adds n / 16.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t shared, int slab_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t(slab_bytes / 16) << 16 | shared / 16;
}

}  // namespace flash_attn::ptx
