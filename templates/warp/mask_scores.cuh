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

// Bounds of all rows that a lane holds.
template <int kTilesM, class Bounds>
struct BoundRows {
  Bounds bounds[2 * kTilesM];

  // Hides what lies outside of the bounds; `first_column` is the block's.
  template <int kTilesN>
  __device__ __forceinline__ void mask(Accumulator<kTilesM, kTilesN>& scores, int first_column) const {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = first_column + n * 8 + fragment_column() + c;
          if (bounds[i].hides(column)) scores[i / 2][n][2 * (i % 2) + c] = -INFINITY;
        }
      }
    }
  }
};

// Rows are queries, packed, from `first_row` of the sequence on.
template <int kTilesM, Mask kMask>
struct QueryRows : BoundRows<kTilesM, QueryBounds<kMask>> {
  __device__ __forceinline__ QueryRows(const AttentionMask<kMask>& mask, int first_row, int group) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      this->bounds[i] = query_bounds(mask, first_row + fragment_row(i), group);
    }
  }
};

// Rows are keys.
template <int kTilesM, Mask kMask>
struct KeyRows : BoundRows<kTilesM, KeyBounds<kMask>> {
  __device__ __forceinline__ KeyRows(const AttentionMask<kMask>& mask, int first_key, int seqlen_q) {
#pragma unroll
    for (int i = 0; i < 2 * kTilesM; ++i) {
      this->bounds[i] = key_bounds(mask, first_key + fragment_row(i), seqlen_q);
    }
  }
};

}  // namespace flash_attn
