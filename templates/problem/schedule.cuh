// Which tile of queries, or of keys in the backward, a thread block works on.
//
// Tiles are numbered in one dimension, so that batch x heads may exceed 65,535. Under a causal mask heads
// come in sections whose keys and values fit into L2 together, and inside a section the last, longest, tiles
// of all heads run first, so that short ones fill the end. Otherwise heads run one after the other. Where
// thread blocks of a backward take turns, heads come in sections under every mask. Query heads that share
// keys may be packed into a tile.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace flash_attn {

struct TileSchedule {
  int64_t tiles_m;        // tiles of queries per head
  int64_t batch_heads;    // batch entries x query heads
  int64_t section_heads;  // of these, how many form a section
  int num_heads;

  struct Tile {
    int m_block;
    int batch;
    int head;
    int key_part = 0;  // where several thread blocks share the keys
  };

  // Every product below is at most num_tiles(), which a launch holds under 2^31.
  constexpr Tile tile(int index) const {
    const int section_tiles = static_cast<int>(section_heads * tiles_m);
    const int section = index / section_tiles;
    const int in_section = index - section * section_tiles;
    const int first = section * static_cast<int>(section_heads);
    const int heads = std::min(static_cast<int>(section_heads), static_cast<int>(batch_heads) - first);
    const int batch_head = first + in_section % heads;
    return {static_cast<int>(tiles_m) - 1 - in_section / heads, batch_head / num_heads,
            batch_head % num_heads};
  }

  constexpr int64_t num_tiles() const { return tiles_m * batch_heads; }
};

// A schedule of `tiles_m` tiles for each of `num_heads` heads. With `sections`, `heads` groups of `group`
// heads (at least one) form a section.
inline TileSchedule make_sections(const ForwardParams& params, int64_t tiles_m, int num_heads, bool sections,
                                  int64_t heads, int64_t group) {
  const int64_t batches = int64_t{params.batch} + (params.cu_seqlens_q != nullptr ? 1 : 0);
  TileSchedule schedule{};
  schedule.tiles_m = tiles_m;
  schedule.num_heads = num_heads;
  schedule.batch_heads = batches * num_heads;
  schedule.section_heads = sections ? std::min(std::max<int64_t>(heads, 1) * group, schedule.batch_heads) : 1;
  return schedule;
}

// Plain softmax(scale Q K^T) V runs the kernel without score modifiers. A scale that is not positive needs
// them, because the plain kernel takes the maximum before it scales; a large one, because the exponents are
// off by what rounding the scaled maximum leaves.
constexpr bool needs_modifiers(const ForwardParams& params) {
  constexpr float kMaxPlainScale = 256.0f;
  return params.alibi_slopes != nullptr || params.softcap > 0.0f || params.dropout_p > 0.0f ||
         !(params.softmax_scale > 0.0f && params.softmax_scale <= kMaxPlainScale);
}

// Rows of each sequence and KV head: queries x heads that share keys.
constexpr int64_t group_rows(const ForwardParams& params) {
  return int64_t{params.seqlen_q} * (params.num_heads / params.num_heads_k);
}

// How many query heads to pack into the rows of a tile: the whole group that shares keys, or 1. It pays where
// a tile has more rows than there are queries: if tiles without packing are filled to less than 0.9 of what
// they would be (FlashAttention-3's rule).
constexpr int group_to_pack(const ForwardParams& params, int block_m) {
  const int group = params.num_heads / params.num_heads_k;
  if (block_m % group != 0 || needs_modifiers(params)) return 1;
  const auto tiles = [&](int64_t rows) { return (rows + block_m - 1) / block_m; };
  return 10 * tiles(group_rows(params)) < 9 * group * tiles(params.seqlen_q) ? group : 1;
}

// The forward's schedule: tiles of `block_m` queries. `section_bytes` of keys and values may form a section:
// what stays in L2 while a section runs. `packed` query heads share a tile, see QueryBlock.
inline TileSchedule make_schedule(const ForwardParams& params, int block_m, Mask mask, int64_t section_bytes,
                                  int packed = 1) {
  const int64_t tiles_m = (int64_t{params.seqlen_q} * packed + block_m - 1) / block_m;
  const int num_heads = params.num_heads / packed;
  const int64_t head_bytes = int64_t{2} * params.seqlen_k * (params.head_dim + params.head_dim_v);
  return make_sections(params, tiles_m, num_heads, mask == Mask::kCausal,
                       section_bytes / std::max<int64_t>(head_bytes, 1), num_heads / params.num_heads_k);
}

// The backward's schedule: tiles of `block_n` keys, each computed in `parts`, one per range of query heads. A
// section is as many heads as keep Q, dO and fp32 dQ in L2.
inline TileSchedule make_key_schedule(const ForwardParams& params, int block_n, int parts, bool sections,
                                      int64_t section_bytes) {
  const int64_t tiles_n = (int64_t{params.seqlen_k} + block_n - 1) / block_n;
  const int num_heads = params.num_heads_k * parts;
  const int64_t row_bytes = int64_t{2} * (params.head_dim + params.head_dim_v) + int64_t{4} * params.head_dim;
  const int64_t head_bytes = row_bytes * params.seqlen_q * (params.num_heads / num_heads);
  return make_sections(params, tiles_n, num_heads, sections, section_bytes / std::max<int64_t>(head_bytes, 1),
                       1);
}

}  // namespace flash_attn
