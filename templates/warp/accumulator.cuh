// A warp's accumulators of mma.sync and wgmma: which lane holds what, and how they become operands.
#pragma once

#include <cstdint>

#include "ptx/arithmetic.cuh"

namespace flash_attn {

// Element [m][n] is the 16x8 tile in tile row m and tile column n; ptx/mma.cuh says which lane holds what of
// it.
template <int kTilesM, int kTilesN>
using Accumulator = float[kTilesM][kTilesN][4];

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// A lane holds two rows of each 16: the row of number `i`, and its first column of two in each 8.
__device__ __forceinline__ int fragment_row(int i) { return i / 2 * 16 + i % 2 * 8 + lane_index() / 4; }
__device__ __forceinline__ int fragment_column() { return lane_index() % 4 * 2; }

// Calls function(score, row, column) for every score of the block that this lane holds, with coordinates in
// the sequence.
template <int kTilesM, int kTilesN, class Function>
__device__ __forceinline__ void for_each_score(Accumulator<kTilesM, kTilesN>& scores, int first_row,
                                               int first_column, Function function) {
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = first_row + fragment_row(i);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        function(scores[i / 2][n][2 * (i % 2) + c], row, first_column + fragment_column() + n * 8 + c);
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
    a[i] = ptx::pack<kDtype>(p[0], p[1]);
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

}  // namespace flash_attn
