// Score modifiers: scale, softcap and ALiBi, in log2 units, so that the softmax's own scale is 1 afterwards.
#pragma once

#include <cstdint>

#include "abi.h"
#include "common/softmax.cuh"
#include "ptx/math.cuh"

namespace flash_attn {

// Plain softmax(scale Q K^T) V runs the kernel without score modifiers; a scale that is not positive needs
// them, because the plain kernel takes the maximum before it scales.
inline bool needs_modifiers(const ForwardParams& params) {
  return params.alibi_slopes != nullptr || params.softcap > 0.0f || params.dropout_p > 0.0f ||
         !(params.softmax_scale > 0.0f);
}

struct ScoreModifiers {
  float scale_log2;     // applied when there is no softcap
  float softcap_log2;   // softcap * log2(e); 0 without softcap
  float softcap_inner;  // softmax_scale / softcap
  float slope_log2;     // ALiBi slope * log2(e); 0 without ALiBi

  __device__ ScoreModifiers(const ForwardParams& params, int batch, int head)
      : scale_log2(params.softmax_scale * kLog2E),
        softcap_log2(params.softcap * kLog2E),
        softcap_inner(params.softcap > 0.0f ? params.softmax_scale / params.softcap : 0.0f),
        slope_log2(0.0f) {
    if (params.alibi_slopes != nullptr) {
      slope_log2 = params.alibi_slopes[batch * params.alibi_batch_stride + head] * kLog2E;
    }
  }

  // `distance` is row + diagonal - column.
  __device__ __forceinline__ float apply(float score, int distance) const {
    const float scaled =
        softcap_log2 > 0.0f ? softcap_log2 * tanh(score * softcap_inner) : score * scale_log2;
    return scaled - bias(distance);
  }

  // The derivative of the softcap where `apply` has returned `score`.
  __device__ __forceinline__ float softcap_derivative(float score, int distance) const {
    if (!(softcap_log2 > 0.0f)) return 1.0f;
    const float tanh = (score + bias(distance)) / softcap_log2;
    return 1.0f - tanh * tanh;
  }

 private:
  __device__ __forceinline__ float bias(int distance) const {
    return slope_log2 * fabsf(static_cast<float>(distance));
  }

  // tanh.approx would cost half the special-function work, but its relative error of 2^-11 exceeds what
  // rounding the inputs to fp16 costs. Near 0, where 1 - 2 / (exp(2x) + 1) cancels, the series is exact to
  // 2^-23.
  __device__ static __forceinline__ float tanh(float x) {
    const float by_exponential =
        1.0f - 2.0f * ptx::reciprocal_approx(ptx::exp2_approx(2.0f * kLog2E * x) + 1.0f);
    return fabsf(x) < 0.03f ? x - x * x * x * (1.0f / 3.0f) : by_exponential;
  }
};

}  // namespace flash_attn
