// Additions to global memory by the L2 cache, of which nothing is returned.
#pragma once

namespace flash_attn::ptx {

// Adds four values to `kStride` apart addresses from `global` on: one instruction, for neighbours aligned to
// 16 bytes on GPUs from sm_90 on, else four.
template <int kStride>
__device__ __forceinline__ void add_global(float* global, const float (&values)[4]) {
#if __CUDA_ARCH__ >= 900
  if constexpr (kStride == 1) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(global), "f"(values[0]),
                 "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      asm volatile("red.global.add.f32 [%0], %1;" ::"l"(global + i * kStride), "f"(values[i]) : "memory");
    }
  }
}

}  // namespace flash_attn::ptx
