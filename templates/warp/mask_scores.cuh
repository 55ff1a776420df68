// The mask as bounds of each row of an accumulator, which a lane computes once for all columns of the row
// that it holds. Rows are queries and columns keys, or in the backward the other way round.
#pragma once

#include <climits>
#include <cmath>

#include "problem/mask.cuh"
#include "warp/accumulator.cuh"

namespace flash_attn {

// The columns [first, end) of a row that stay; of the two bounds only what the mask needs.
template <bool kHasFirst, bool kHasEnd>
struct RowBounds {
  int first;
  int end;

  // Both comparisons are made: a short circuit spilled 72 bytes in the windowed Hopper forward of head
  // dim 64.
  __device__ __forceinline__ bool hides(int column) const {
    const bool before = kHasFirst && column < first, behind = kHasEnd && column >= end;
    return before || behind;
  }
};

template <Mask kMask>
using QueryBounds = RowBounds<AttentionMask<kMask>::kLeft, true>;
template <Mask kMask>
using KeyBounds = RowBounds<true, AttentionMask<kMask>::kLeft>;

// Bounds of a row of queries, `group` of which belong to one query. The mask counts queries.
template <Mask kMask>
__device__ __forceinline__ QueryBounds<kMask> query_bounds(const AttentionMask<kMask>& mask, int row,
                                                           int group) {
  const int query = row / group;
  return {mask.first_key(query), mask.end_key(query)};
}

// Bounds of a row of a key. One past the end of the sequence keeps no query.
template <Mask kMask>
__device__ __forceinline__ KeyBounds<kMask> key_bounds(const AttentionMask<kMask>& mask, int key,
                                                       int seqlen_q) {
  return {key < mask.seqlen_k ? mask.first_query(key) : INT_MAX, mask.end_query(key, seqlen_q)};
}

// Hides what of the lane's row of number `i` lies outside of its bounds; `column` is the block's first.
template <class Bounds, int kTilesM, int kTilesN>
__device__ __forceinline__ void mask_row(Accumulator<kTilesM, kTilesN>& scores, int i, int column,
                                         const Bounds& bounds) {
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (bounds.hides(column + n * 8 + fragment_column() + c)) scores[i / 2][n][2 * (i % 2) + c] = -INFINITY;
    }
  }
}

// Bounds of all rows of queries that a lane holds, from `first_row` of the sequence's packed rows on.
template <int kTilesM, Mask kMask>
struct QueryRows {
  QueryBounds<kMask> bounds[2 * kTilesM];

  __device__ __forceinline__ QueryRows(const AttentionMask<kMask>& mask, int first_row, int group) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) bounds[i] = query_bounds(mask, first_row + fragment_row(i), group);
  }

  // `key` is that of the block's first column.
  template <int kTilesN>
  __device__ __forceinline__ void mask(Accumulator<kTilesM, kTilesN>& scores, int key) const {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) mask_row(scores, i, key, bounds[i]);
  }
};

}  // namespace flash_attn
