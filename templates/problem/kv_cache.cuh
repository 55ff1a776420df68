// Where the keys of a sequence lie in a KV cache: a row of it, or pages named by a block table; and which
// tile computes a call over it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"
#include "problem/sequence.cuh"

namespace flash_attn {

// Whether every row of a tensor (.., head_dim) starts and ends at a multiple of 16 bytes.
inline bool rows_aligned(const void* tensor, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                         int head_dim) {
  const int64_t elements = batch_stride | row_stride | head_stride | head_dim;
  return elements % 8 == 0 && reinterpret_cast<uintptr_t>(tensor) % 16 == 0;
}

// Whether K and V can be copied, and written, 16 bytes at a time; otherwise it is done by elements.
inline bool cache_aligned(const CacheParams& params) {
  const ForwardParams& forward = params.forward;
  return params.cache_head_dim == forward.head_dim && params.cache_head_dim_v == forward.head_dim_v &&
         rows_aligned(forward.k, forward.k_batch_stride, forward.k_row_stride, forward.k_head_stride,
                      forward.head_dim) &&
         rows_aligned(forward.v, forward.v_batch_stride, forward.v_row_stride, forward.v_head_stride,
                      forward.head_dim_v);
}

// Rows, which are queries x heads that share keys, and keys of a block; rows 0: the kernel lacks the tile.
struct TileShape {
  int rows;
  int keys;
};

// The tiles of a kernel over a KV cache: three of the mma design, named by their rows, and one of the wgmma
// design.
struct CacheTiles {
  TileShape rows16;
  TileShape rows64;
  TileShape rows128;
  TileShape wgmma;
};

// The mma design's tile for calls with more rows than any tile has.
constexpr const TileShape& largest_mma_tile(const CacheTiles& tiles) {
  return tiles.rows128.rows > 0 ? tiles.rows128 : tiles.rows64;
}

// The mma design's tile for `rows` rows of each sequence and KV head: the smallest that holds them all, else
// the largest. A cache that is not `aligned` has a kernel with rows64 alone, for any number of rows.
constexpr const TileShape& mma_tile(const CacheTiles& tiles, int64_t rows, bool aligned) {
  if (!aligned) return tiles.rows64;
  if (rows <= tiles.rows16.rows) return tiles.rows16;
  return rows <= tiles.rows64.rows ? tiles.rows64 : largest_mma_tile(tiles);
}

struct CachedSequence : Sequence {
  int batch;
  int cache_row = 0;  // row of a cache without pages; -1 if there is no such row
  int length = 0;     // keys that the cache held before this call appends its own, skipped ones included

  // Lengths and rows on the device cannot be checked before the launch: they are cut down to what is there.
  constexpr CachedSequence(const CacheParams& params, int batch)
      : Sequence(params.forward, batch), batch(batch) {
    if (batch == params.forward.batch) return;
    const int capacity = params.forward.seqlen_k;
    length = params.cache_seqlen;
    if (params.cache_seqlens != nullptr) {
      length = params.cache_seqlens[batch];
    } else if (params.forward.cu_seqlens_k != nullptr) {
      length = seqlen_k;
    }
    length = clamp(length, capacity);
    if (params.page_size > 0) {
      k_row = 0;
    } else {
      cache_row = params.cache_batch_idx != nullptr ? params.cache_batch_idx[batch] : batch;
      if (cache_row < 0 || cache_row >= params.cache_entries) cache_row = -1;
    }
    seqlen_k = std::max(std::min(length + params.seqlen_new, capacity) - k_row, 0);
  }
};

// Row `row` of a page or of a row of the cache; -1 is outside the cache, where nothing is read or written.
struct KeyLocation {
  int page_or_batch;
  int row;
};

constexpr int existing_page(const CacheParams& params, int page) {
  return page >= 0 && page < params.cache_entries ? page : -1;
}

// The location as the block table gives it: its page may lie outside the cache, see `existing_page`.
constexpr KeyLocation look_up_key(const CacheParams& params, const CachedSequence& sequence, int key) {
  if (key >= params.forward.seqlen_k - sequence.k_row) return {-1, 0};
  if (params.page_size == 0) return {sequence.cache_row, sequence.k_row + key};
  const int page = key / params.page_size;
  return {params.block_table[sequence.batch * params.block_table_stride + page],
          key - page * params.page_size};
}

constexpr KeyLocation locate_key(const CacheParams& params, const CachedSequence& sequence, int key) {
  const KeyLocation location = look_up_key(params, sequence, key);
  return {existing_page(params, location.page_or_batch), location.row};
}

}  // namespace flash_attn
