// The 16-bit element types and their conversions, special-function instructions, and values that the compiler
// may not compute early.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "abi.h"

namespace flash_attn::ptx {

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

// The same value, which the compiler does not know to be the same. What is computed from it in a branch of a
// loop is computed there: ahead of the loop it would take registers from every round.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 2^x; ex2(-inf) = 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flash_attn::ptx
