// The one definition of which key a query sees, and what follows from it for blocks of keys.
//
// Query i of seqlen_q sees key j of seqlen_k iff  i + diagonal - window_left <= j <= i + diagonal +
// window_right  with diagonal = seqlen_k - seqlen_q (aligned to the bottom right) and 0 <= j < seqlen_k. A
// negative window is unlimited.
#pragma once

#include <cstdint>

#include "abi.h"

namespace flash_attn {

template <Mask kMask>
struct AttentionMask {
  static constexpr bool kRight = kMask != Mask::kFull;
  static constexpr bool kLeft = kMask == Mask::kWindowed;

  int seqlen_k;
  int diagonal;
  int window_left;
  int window_right;
  int group;  // of query heads that are packed: rows are queries times group

  __device__ AttentionMask(const ForwardParams& params, int seqlen_q, int seqlen_k, int group = 1)
      : seqlen_k(seqlen_k),
        diagonal(seqlen_k - seqlen_q),
        window_left(params.window_left),
        window_right(kMask == Mask::kCausal ? 0 : params.window_right),
        group(group) {}

  // Keys visible to `row` are [first_key(row), end_key(row)); the range may be empty.
  __device__ __forceinline__ int end_key(int row) const {
    if (!kRight || (kLeft && window_right < 0)) return seqlen_k;
    return min(seqlen_k, row / group + diagonal + window_right + 1);
  }

  __device__ __forceinline__ int first_key(int row) const {
    return kLeft && window_left >= 0 ? max(0, row / group + diagonal - window_left) : 0;
  }

  // Queries that see `key` are [first_query(key), end_query(key, seqlen_q)), without packed heads.
  __device__ __forceinline__ int first_query(int key) const {
    if (!kRight || (kLeft && window_right < 0)) return 0;
    return max(0, key - diagonal - window_right);
  }

  __device__ __forceinline__ int end_query(int key, int seqlen_q) const {
    if (!kLeft || window_left < 0) return seqlen_q;
    return min(seqlen_q, key - diagonal + window_left + 1);
  }
};

// The blocks of kBlockN keys that the queries [first_row, last_row] see: [begin, end), of which
// [unmasked_begin, unmasked_end) are visible to all of these queries in full.
template <Mask kMask, int kBlockN>
struct KeyBlocks {
  int begin;
  int end;
  int unmasked_begin;
  int unmasked_end;

  __device__ KeyBlocks(const AttentionMask<kMask>& mask, int first_row, int last_row) {
    begin = mask.first_key(first_row) / kBlockN;
    end = (max(mask.end_key(last_row), 0) + kBlockN - 1) / kBlockN;
    unmasked_begin = (mask.first_key(last_row) + kBlockN - 1) / kBlockN;
    unmasked_end = max(mask.end_key(first_row), 0) / kBlockN;
  }

  __device__ __forceinline__ bool needs_mask(int block) const {
    return block >= unmasked_end || (AttentionMask<kMask>::kLeft && block < unmasked_begin);
  }
};

}  // namespace flash_attn
