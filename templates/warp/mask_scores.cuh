// The mask as bounds of each row of an accumulator: a lane computes them once for each of its rows, however
// many columns it holds. Rows are queries and columns keys, or in the backward the other way round.
#pragma once

#include <climits>
#include <cmath>

#include "problem/mask.cuh"
#include "warp/accumulator.cuh"

namespace flash_attn {

// The columns [first, end) that each of this lane's rows keeps; of the two bounds only what the mask needs.
template <int kTilesM, bool kHasFirst, bool kHasEnd>
struct RowBounds {
  int first[2 * kTilesM];
  int end[2 * kTilesM];

  // `column` is the block's first.
  template <int kTilesN>
  __device__ __forceinline__ void apply(Accumulator<kTilesM, kTilesN>& scores, int column) const {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = column + n * 8 + fragment_column() + c;
          const bool before = kHasFirst && at < first[i], behind = kHasEnd && at >= end[i];
          if (before || behind) scores[i / 2][n][2 * (i % 2) + c] = -INFINITY;
        }
      }
    }
  }
};

// Bounds of rows that are queries. `first_row` counts packed rows: `group` rows belong to one query. The mask
// counts queries.
template <int kTilesM, Mask kMask>
__device__ __forceinline__ auto query_bounds(const AttentionMask<kMask>& mask, int first_row, int group) {
  RowBounds<kTilesM, AttentionMask<kMask>::kLeft, true> bounds;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int query = (first_row + fragment_row(i)) / group;
    bounds.first[i] = mask.first_key(query);
    bounds.end[i] = mask.end_key(query);
  }
  return bounds;
}

// Bounds of rows that are keys. A key past the end of the sequence keeps no query.
template <int kTilesM, Mask kMask>
__device__ __forceinline__ auto key_bounds(const AttentionMask<kMask>& mask, int first_key, int seqlen_q) {
  RowBounds<kTilesM, true, AttentionMask<kMask>::kLeft> bounds;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int key = first_key + fragment_row(i);
    bounds.first[i] = key < mask.seqlen_k ? mask.first_query(key) : INT_MAX;
    bounds.end[i] = mask.end_query(key, seqlen_q);
  }
  return bounds;
}

}  // namespace flash_attn
