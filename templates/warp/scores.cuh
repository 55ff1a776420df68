// Score modifiers: scale, softcap and ALiBi, in log2 units, so that the softmax's own scale is 1 afterwards.
#pragma once

#include <cfloat>
#include <cstdint>

#include "abi.h"
#include "ptx/math.cuh"
#include "warp/softmax.cuh"

namespace flash_attn {

// Plain softmax(scale Q K^T) V runs the kernel without score modifiers. A scale that is not positive needs
// them, because the plain kernel takes the maximum before it scales; a large one, because the exponents are
// off by what rounding the scaled maximum leaves.
inline bool needs_modifiers(const ForwardParams& params) {
  constexpr float kMaxPlainScale = 256.0f;
  return params.alibi_slopes != nullptr || params.softcap > 0.0f || params.dropout_p > 0.0f ||
         !(params.softmax_scale > 0.0f && params.softmax_scale <= kMaxPlainScale);
}

struct ScoreModifiers {
  float scale_log2;     // applied when there is no softcap
  float softcap_log2;   // softcap * log2(e); 0 without softcap
  float softcap_inner;  // softmax_scale / softcap
  float slope_log2;     // ALiBi slope * log2(e); 0 without ALiBi

  // A high softcap is lowered until all factors are normal numbers, which fp32 does not show unless q k^T
  // exceeds 2^88, or a score 2^115. Where it is so low that the inner factor overflows, all scores but 0 are
  // at the cap anyway.
  __device__ ScoreModifiers(const ForwardParams& params, int batch, int head)
      : scale_log2(params.softmax_scale * kLog2E), softcap_log2(0.0f), softcap_inner(0.0f), slope_log2(0.0f) {
    const float softcap = fminf(params.softcap, fminf(0x1p127f, fabsf(params.softmax_scale) * 0x1p100f));
    if (softcap > 0.0f) {
      softcap_log2 = softcap * kLog2E;
      softcap_inner = fminf(fmaxf(params.softmax_scale / softcap, -FLT_MAX), FLT_MAX);
    }
    if (params.alibi_slopes != nullptr) {
      slope_log2 = params.alibi_slopes[batch * params.alibi_batch_stride + head] * kLog2E;
    }
  }

  __device__ __forceinline__ bool caps() const { return softcap_log2 > 0.0f; }

  // The capped score, and the derivative of the softcap there; only where it `caps`.
  //
  // Both come from e = exp(-2 |x|): tanh |x| = 2 / (1 + e) - 1, and 1 - tanh^2 x = 4 e / (1 + e)^2, which
  // does not cancel where tanh saturates. tanh.approx would cost half the special-function work, but its
  // relative error of 2^-11 exceeds what rounding the inputs to fp16 costs. Near 0, where the difference
  // cancels, the series is exact to 2^-23.
  __device__ __forceinline__ float cap(float score, float& derivative) const {
    const float x = score * softcap_inner;
    const float e = ptx::exp2_approx(-2.0f * kLog2E * fabsf(x)), r = ptx::reciprocal_approx(1.0f + e);
    derivative = 4.0f * e * r * r;
    const float tanh = fabsf(x) < 0.03f ? x - x * x * x * (1.0f / 3.0f) : copysignf(fmaf(2.0f, r, -1.0f), x);
    return softcap_log2 * tanh;
  }

  // The score before ALiBi.
  __device__ __forceinline__ float scale(float score) const {
    float derivative;
    return caps() ? cap(score, derivative) : score * scale_log2;
  }

  // What ALiBi subtracts; `distance` is row + diagonal - column.
  __device__ __forceinline__ float bias(int distance) const {
    return slope_log2 * fabsf(static_cast<float>(distance));
  }
};

}  // namespace flash_attn
