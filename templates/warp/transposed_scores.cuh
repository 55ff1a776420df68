// What is done to transposed scores, S^T = K Q^T, while they are accumulators: rows are keys, columns
// queries.
#pragma once

#include <cstdint>

#include "warp/accumulator.cuh"
#include "warp/dropout.cuh"
#include "warp/scores.cuh"

namespace flash_attn {

// Calls function(a, b) for each score of a and the same one of b.
template <int kTilesM, int kTilesN, class Function>
__device__ __forceinline__ void for_each_pair(Accumulator<kTilesM, kTilesN>& a,
                                              Accumulator<kTilesM, kTilesN>& b, Function function) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) function(a[m][n][c], b[m][n][c]);
    }
  }
}

// S^T becomes what the exponent takes, before the mask, and `derivative` what dS is multiplied by because of
// it. `diagonal` is seqlen_k - seqlen_q.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void modify_transposed(Accumulator<kTilesM, kTilesN>& scores,
                                                  Accumulator<kTilesM, kTilesN>& derivative,
                                                  const ScoreModifiers& modifiers, int diagonal,
                                                  int first_key, int first_query) {
  if (modifiers.caps()) {
    for_each_pair(scores, derivative,
                  [&](float& score, float& slope) { score = modifiers.cap(score, slope); });
  } else {
    modifiers.scale_all(scores);
    for_each_score(derivative, [](float& slope) { slope = 1.0f; });
  }
  for_each_score(scores, first_key, first_query,
                 [&](float& score, int key, int query) { score -= modifiers.bias(query + diagonal - key); });
}

// Marks dropped probabilities by their sign. One call of the generator serves eight scores of a 16x16 block
// as a lane holds them when rows are queries; transposed, those eight belong to two lanes, each of which
// holds eight scores of two calls. So each makes one of the calls and gives its result to the other.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void mark_transposed_dropout(Accumulator<kTilesM, kTilesN>& probs,
                                                        const Dropout& dropout, int first_key,
                                                        int first_query) {
  const int lane = lane_index(), key = lane / 4;
  const bool odd_key = key % 2;
  const int generated = (2 * (lane % 4) + odd_key) * 4 + key / 2;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      const uint4 own = dropout.words(first_query / 16 + n / 2, first_key / 16 + m, generated);
      const uint32_t words[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const uint32_t other = __shfl_xor_sync(0xffffffff, words[word], 4);
        float* pair = probs[m][n + word % 2] + word / 2 * 2;  // the word's queries % 2 == 0 and 1
        if (!dropout.keeps(odd_key ? other : words[word], odd_key)) pair[0] = -pair[0];
        if (!dropout.keeps(odd_key ? words[word] : other, odd_key)) pair[1] = -pair[1];
      }
    }
  }
}

}  // namespace flash_attn
