// What happens to scores between Q K^T and P V besides the softmax itself, as a policy type of the kernel.
//
// A policy has
//   kFolded          true if scores stay as they are and the scale is folded into the exponent
//   exponent_scale   what a score is multiplied by in the exponent of 2
//   modify           S = Q K^T becomes what the exponent takes, before the mask
//   drop             zeroes dropped probabilities; those that are kept are rescaled once, with the output
//   output_factor    what O is multiplied by besides 1 / sum
// and in the backward (warp/transposed_scores.cuh) modify_transposed.
#pragma once

#include <cfloat>
#include <cstdint>

#include "abi.h"
#include "problem/sequence.cuh"
#include "ptx/arithmetic.cuh"
#include "warp/accumulator.cuh"
#include "warp/dropout.cuh"
#include "warp/softmax.cuh"

namespace flash_attn {

// softmax(scale Q K^T).
struct PlainScores {
  static constexpr bool kFolded = true;
  const ForwardParams& params;

  __device__ __forceinline__ float exponent_scale() const { return params.softmax_scale * kLog2E; }
  __device__ __forceinline__ float output_factor() const { return 1.0f; }

  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void modify(Accumulator<kTilesM, kTilesN>&, const QueryBlock&, int, int,
                                         int) const {}
  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void drop(Accumulator<kTilesM, kTilesN>&, const QueryBlock&, int, int) const {}
};

// Scale, softcap and ALiBi of a score, in log2 units, so that the softmax's own scale is 1 afterwards.
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

  // What ALiBi subtracts; `distance` is query + diagonal - key.
  __device__ __forceinline__ float bias(int distance) const {
    return slope_log2 * fabsf(static_cast<float>(distance));
  }

  // Scale and softcap. One branch for all of them: with one for each, exponentials would not overlap.
  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void scale_all(Accumulator<kTilesM, kTilesN>& scores) const {
    if (caps()) {
      float derivative;
      for_each_score(scores, [&](float& score) { score = cap(score, derivative); });
    } else {
      for_each_score(scores, [&](float& score) { score *= scale_log2; });
    }
  }
};

// Any scale, softcap, ALiBi and dropout.
struct ModifiedScores {
  static constexpr bool kFolded = false;
  const ForwardParams& params;

  __device__ __forceinline__ float exponent_scale() const { return 1.0f; }
  __device__ __forceinline__ float output_factor() const { return params.dropout_rescale; }

  // `row` is the first one's in the block of queries, `key` the first column's; `diagonal` is seqlen_k -
  // seqlen_q. The heads of packed rows, and with them their slopes, differ.
  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void modify(Accumulator<kTilesM, kTilesN>& scores, const QueryBlock& queries,
                                         int diagonal, int row, int key) const {
    ScoreModifiers(params, queries.batch, queries.head_of(row)).scale_all(scores);
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int in_block = row + fragment_row(i);
      const ScoreModifiers modifiers(params, queries.batch, queries.head_of(in_block));
      const int distance = queries.query_of(in_block) + diagonal - key - fragment_column();
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          scores[i / 2][n][2 * (i % 2) + c] -= modifiers.bias(distance - n * 8 - c);
        }
      }
    }
  }

  template <int kTilesM, int kTilesN>
  __device__ __forceinline__ void drop(Accumulator<kTilesM, kTilesN>& probs, const QueryBlock& queries,
                                       int row, int key) const {
    if (!(params.dropout_p > 0.0f)) return;
    const Dropout dropout(params, queries.batch * params.num_heads + queries.head);
    const int first_block = (queries.first_row + row) / 16;
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        const uint4 words = dropout.words(first_block + m, key / 16 + n / 2, lane_index());
        const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (!dropout.keeps(word[i / 2], i % 2)) probs[m][n + i / 4][i % 4] = 0.0f;
        }
      }
    }
  }
};

}  // namespace flash_attn
