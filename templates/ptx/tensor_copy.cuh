// Bulk copies of tensor boxes into shared memory by the TMA unit (sm_90).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_attn::ptx {

// Copies the box at coordinates (c0, .., c4), innermost first, to `shared`, and counts its bytes at
// `barrier`. What lies outside the tensor arrives as zeros.
__device__ __forceinline__ void copy_tensor(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int c0,
                                            int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6, "
      "%7}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void copy_tensor(uint32_t shared, const CUtensorMap& map, uint32_t barrier, int c0,
                                            int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2];" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace flash_attn::ptx
