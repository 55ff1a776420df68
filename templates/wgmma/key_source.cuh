// Where keys come from and where results go: what differs between a call whose K and V are tensors and one
// over a KV cache. A KeySource is the argument of the forward kernel (`TensorKeys`, `CacheKeys`):
//
//   kProducers               threads that copy: 1, or 64 (a warp for Q and K, one for V)
//   kDropout                 whether a call may have dropout
//   maps, schedule, group    tensor maps; tiles of queries; query heads that share keys where they are packed
//   forward()                the call's parameters
//   num_tiles(), tile(i)     the tiles of the schedule, once for each part of the keys
//   key_parts()              parts of the keys, of which a tile computes one
//   sequence(batch)          lengths and places of a batch entry's queries and keys
//   tensor(block_n)          K and V as the tensor maps describe them (host)
//   has_rows_behind()        whether memory behind a sequence's last key may hold anything
//   locate(sequence, block)  where this lane's keys of a block lie
//   copy(map, ..)            starts the copy of a block of K or V
//   store(.., key_part, ..)  what a warpgroup has of its rows at the end
//   store_no_keys(..)        the same of rows that see no key
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_attn::wgmma {

// Q, K and V as the TMA unit sees them, read in boxes of 64 columns and the rows of a tile. K and V are
// (head_dim, row, head, page or batch), Q is (head_dim, head of a packed group, row, group, batch) so that a
// box holds the heads of a group for each of its rows.
struct TensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
};

// The sizes of K and V, and the rows of a box of theirs.
struct KeyTensor {
  int64_t rows;
  int64_t batch;
  int box_rows;
};

}  // namespace flash_attn::wgmma
