// A mask as bounds of each row: where query heads are packed, it costs a division for each row, not for each
// score.
#pragma once

#include <cmath>

#include "problem/mask.cuh"
#include "warp/accumulator.cuh"

namespace flash_attn {

// The keys [first, end) that each of this lane's rows sees.
template <int kTilesM>
struct RowBounds {
  int first[2 * kTilesM];
  int end[2 * kTilesM];

  // Of rows from `first_row` on, `group` of them for each query, which is what the mask counts.
  template <Mask kMask>
  __device__ __forceinline__ RowBounds(const AttentionMask<kMask>& mask, int first_row, int group) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      const int query = (first_row + i / 2 * 16 + i % 2 * 8 + static_cast<int>(threadIdx.x % 32) / 4) / group;
      first[i] = mask.first_key(query);
      end[i] = mask.end_key(query);
    }
  }

  // `key` is that of the block's first column.
  template <int kTilesN>
  __device__ __forceinline__ void apply(Accumulator<kTilesM, kTilesN>& scores, int key) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = key + n * 8 + 2 * (lane % 4) + c;
          if (column < first[i] || column >= end[i]) scores[i / 2][n][2 * (i % 2) + c] = -INFINITY;
        }
      }
    }
  }
};

}  // namespace flash_attn
