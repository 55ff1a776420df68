// The 16-bit element types and their conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "abi.h"

namespace flash_attn {

template <Dtype kDtype>
struct ElementOf;

template <>
struct ElementOf<Dtype::kFp16> {
  using Type = __half;
};

template <>
struct ElementOf<Dtype::kBf16> {
  using Type = __nv_bfloat16;
};

// Two fp32 values rounded to 16 bits, `low` in the low half.
template <Dtype kDtype>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDtype == Dtype::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

template <Dtype kDtype>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (kDtype == Dtype::kBf16) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
}

}  // namespace flash_attn
