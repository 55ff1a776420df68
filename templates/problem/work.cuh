// What a thread block, or a warpgroup of it, computes: rows of queries, over the blocks of keys that they
// see, or over one of several parts of these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "abi.h"
#include "problem/mask.cuh"
#include "problem/sequence.cuh"

namespace flash_attn {

// One of `count` parts of the keys of a row, whose partial results ops/combine.cu merges.
struct KeyPart {
  int index = 0;
  int count = 1;

  // Where row i of a partial result goes: O in fp32, and its LSE.
  constexpr int64_t partial_row(const QueryBlock& queries, int i) const {
    return queries.index(i) * count + index;
  }
};

// Merging of the parts of a row: how many of them a warp reads at once, and the warps of a thread block.
constexpr int kMergedAtOnce = 8;
constexpr int kMergingWarps = 8;

// Warps that share each of `rows` rows to merge: all of a thread block where so few rows have so many parts
// that most of the GPU would be idle otherwise.
constexpr int merging_warps(double rows, int parts, int multiprocessors) {
  const bool few = rows <= double{kMergingWarps} * multiprocessors;
  return few && parts > kMergedAtOnce ? kMergingWarps : 1;
}

template <Mask kMask, int kBlockN>
struct Work {
  QueryBlock queries;
  AttentionMask<kMask> mask;
  KeyBlocks<kMask, kBlockN> blocks;

  constexpr explicit Work(const QueryBlock& queries)
      : queries(queries),
        mask(*queries.params, queries.sequence.seqlen_q, queries.sequence.seqlen_k),
        blocks(mask, queries.query_of(0), queries.query_of(queries.rows - 1)) {
    if (queries.rows <= 0 || blocks.begin > blocks.end) blocks.end = blocks.begin;
  }

  // Leaves one of several parts of the blocks, all of one size but the last ones.
  constexpr void keep(const KeyPart& part) {
    const int blocks_each = (blocks.end - blocks.begin + part.count - 1) / part.count;
    const int begin = blocks.begin + part.index * blocks_each;
    keep(begin, begin + blocks_each);
  }
  constexpr void keep(int begin, int end) {
    blocks.begin = std::max(blocks.begin, begin);
    blocks.end = std::max(std::min(blocks.end, end), blocks.begin);
  }

  constexpr bool has_keys() const { return blocks.begin < blocks.end; }
};

// Rows that see no key in this part: O = 0, and LSE = -inf unless it is the only part. Threads
// 0 .. threads - 1 share the work; `thread` is this one.
template <class Element>
constexpr void store_no_keys(const CacheParams& params, const QueryBlock& queries, const KeyPart& part,
                             int thread, int threads) {
  if (part.count == 1) return store_empty_rows<Element>(queries, thread, threads);
  const int chunks = params.forward.head_dim_v / 4;
#pragma unroll 1
  for (int i = thread; i < queries.rows * chunks; i += threads) {
    const int64_t row = part.partial_row(queries, i / chunks);
    reinterpret_cast<ZeroChunk*>(params.out_partial)[row * chunks + i % chunks] = ZeroChunk{};
    if (i % chunks == 0) params.lse_partial[row] = -std::numeric_limits<float>::infinity();
  }
}

}  // namespace flash_attn
