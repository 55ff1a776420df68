// A warp's accumulators of mma.sync and what is done to scores while they are there: modifiers, mask and
// dropout.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem/mask.cuh"
#include "ptx/dtype.cuh"
#include "warp/dropout.cuh"
#include "warp/scores.cuh"

namespace flash_attn {

// Element [m][n] is the 16x8 tile in tile row m and tile column n; ptx/mma.cuh says which lane holds what of
// it.
template <int kTilesM, int kTilesN>
using Accumulator = float[kTilesM][kTilesN][4];

// Calls function(score, row, column) for every score of the block that this lane holds, with coordinates in
// the sequence.
template <int kTilesM, int kTilesN, class Function>
__device__ __forceinline__ void for_each_score(Accumulator<kTilesM, kTilesN>& scores, int first_row,
                                               int first_column, Function function) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          function(scores[m][n][2 * half + c], row, first_column + 2 * (lane % 4) + n * 8 + c);
        }
      }
    }
  }
}

// Calls function(score) for every score.
template <int kTilesM, int kTilesN, class Function>
__device__ __forceinline__ void for_each_score(Accumulator<kTilesM, kTilesN>& scores, Function function) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) function(scores[m][n][c]);
    }
  }
}

// Scale and softcap. One branch for all of them: with one for each, exponentials would not overlap.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void scale_scores(Accumulator<kTilesM, kTilesN>& scores,
                                             const ScoreModifiers& modifiers) {
  if (modifiers.caps()) {
    float derivative;
    for_each_score(scores, [&](float& score) { score = modifiers.cap(score, derivative); });
  } else {
    for_each_score(scores, [&](float& score) { score *= modifiers.scale_log2; });
  }
}

// Scale, softcap and ALiBi; `diagonal` is seqlen_k - seqlen_q.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void apply_modifiers(Accumulator<kTilesM, kTilesN>& scores,
                                                const ScoreModifiers& modifiers, int diagonal, int first_row,
                                                int first_column) {
  scale_scores(scores, modifiers);
  for_each_score(scores, first_row, first_column, [&](float& score, int row, int column) {
    score -= modifiers.bias(row + diagonal - column);
  });
}

template <Mask kMask, int kTilesM, int kTilesN>
__device__ __forceinline__ void apply_mask(Accumulator<kTilesM, kTilesN>& scores,
                                           const AttentionMask<kMask>& mask, int first_row,
                                           int first_column) {
  for_each_score(scores, first_row, first_column, [&](float& score, int row, int column) {
    if (column >= mask.end_key(row) || column < mask.first_key(row)) score = -INFINITY;
  });
}

// P rounded to 16 bits, as A operands of O += P V: element [m][k] holds rows of tile m and 16 keys from 16 k
// on.
template <int kTilesM, int kTilesN>
using RoundedProbs = uint32_t[kTilesM][kTilesN / 2][4];

// Two neighbouring accumulator tiles, rounded, are one A operand: no exchange between lanes.
template <Dtype kDtype, int kTilesM, int kTilesN>
__device__ __forceinline__ void get_operand(uint32_t (&a)[4], const Accumulator<kTilesM, kTilesN>& probs,
                                            int m, int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float* p = probs[m][2 * k + i / 2] + 2 * (i % 2);
    a[i] = pack<kDtype>(p[0], p[1]);
  }
}

template <Dtype kDtype, int kTilesM, int kSteps>
__device__ __forceinline__ void get_operand(uint32_t (&a)[4], const uint32_t (&probs)[kTilesM][kSteps][4],
                                            int m, int k) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = probs[m][k][i];
}

template <Dtype kDtype, int kTilesM, int kTilesN>
__device__ __forceinline__ void round_probs(uint32_t (&rounded)[kTilesM][kTilesN / 2][4],
                                            const float (&probs)[kTilesM][kTilesN][4]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int k = 0; k < kTilesN / 2; ++k) get_operand<kDtype>(rounded[m][k], probs, m, k);
  }
}

// Zeroes the dropped probabilities; what is kept is rescaled once, with the output.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void apply_dropout(Accumulator<kTilesM, kTilesN>& probs, const Dropout& dropout,
                                              int first_row, int first_column) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      const uint4 words = dropout.words(first_row / 16 + m, first_column / 16 + n / 2, threadIdx.x % 32);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!dropout.keeps(word[i / 2], i % 2)) probs[m][n + i / 4][i % 4] = 0.0f;
      }
    }
  }
}

}  // namespace flash_attn
