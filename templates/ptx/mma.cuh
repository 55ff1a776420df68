// mma.sync m16n8k16: C (16x8, fp32) += A (16x16) B (16x8), one warp (sm_80 and later).
//
// Lane l holds, with g = l / 4 and t = l % 4:
//   A  a[0] (g, 2t..2t+1)   a[1] (g + 8, 2t..)   a[2] (g, 2t + 8..)   a[3] (g + 8, 2t + 8..)
//   B  b0   (2t..2t+1, g)   b1   (2t + 8.., g)
//   C  c[0], c[1] (g, 2t..2t+1)                  c[2], c[3] (g + 8, 2t..2t+1)
#pragma once

#include <cstdint>

#include "ptx/arithmetic.cuh"

namespace flash_attn::ptx {

template <Dtype kDtype>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (kDtype == Dtype::kBf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

}  // namespace flash_attn::ptx
