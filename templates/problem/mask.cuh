// The one definition of which key a query sees, and what follows from it for blocks of keys.
//
// Query i of seqlen_q sees key j of seqlen_k iff  i + diagonal - window_left <= j <= i + diagonal +
// window_right  with diagonal = seqlen_k - seqlen_q (aligned to the bottom right) and 0 <= j < seqlen_k. A
// negative window is unlimited.
#pragma once

#include <algorithm>

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

  constexpr AttentionMask(const ForwardParams& params, int seqlen_q, int seqlen_k)
      : seqlen_k(seqlen_k),
        diagonal(seqlen_k - seqlen_q),
        window_left(params.window_left),
        window_right(kMask == Mask::kCausal ? 0 : params.window_right) {}

  // Keys visible to `query` are [first_key(query), end_key(query)); the range may be empty.
  constexpr int end_key(int query) const {
    if (!kRight || (kLeft && window_right < 0)) return seqlen_k;
    return std::min(seqlen_k, query + diagonal + window_right + 1);
  }
  constexpr int first_key(int query) const {
    return kLeft && window_left >= 0 ? std::max(0, query + diagonal - window_left) : 0;
  }

  // Queries that see `key` are [first_query(key), end_query(key, seqlen_q)).
  constexpr int first_query(int key) const {
    if (!kRight || (kLeft && window_right < 0)) return 0;
    return std::max(0, key - diagonal - window_right);
  }
  constexpr int end_query(int key, int seqlen_q) const {
    if (!kLeft || window_left < 0) return seqlen_q;
    return std::min(seqlen_q, key - diagonal + window_left + 1);
  }
};

// The blocks of kBlockN keys that the queries [first_query, last_query] see: [begin, end), of which
// [unmasked_begin, unmasked_end) are visible to all of these queries in full.
template <Mask kMask, int kBlockN>
struct KeyBlocks {
  int begin;
  int end;
  int unmasked_begin;
  int unmasked_end;

  constexpr KeyBlocks(const AttentionMask<kMask>& mask, int first_query, int last_query)
      : begin(mask.first_key(first_query) / kBlockN),
        end((std::max(mask.end_key(last_query), 0) + kBlockN - 1) / kBlockN),
        unmasked_begin((mask.first_key(last_query) + kBlockN - 1) / kBlockN),
        unmasked_end(std::max(mask.end_key(first_query), 0) / kBlockN) {}

  constexpr bool needs_mask(int block) const {
    return block >= unmasked_end || (AttentionMask<kMask>::kLeft && block < unmasked_begin);
  }
};

}  // namespace flash_attn
