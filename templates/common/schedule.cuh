// Which tile of queries a thread block works on.
//
// Tiles are numbered in one dimension, so that batch x heads may exceed 65,535. Under a causal mask heads
// come in sections whose keys and values fit into L2 together, and inside a section the last, longest, tiles
// of all heads run first, so that short ones fill the end. Otherwise heads run one after the other.
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
  };

  // Every product below is at most num_tiles(), which a launch holds under 2^31.
  __device__ Tile tile(int index) const {
    const int section_tiles = static_cast<int>(section_heads * tiles_m);
    const int section = index / section_tiles;
    const int in_section = index - section * section_tiles;
    const int first = section * static_cast<int>(section_heads);
    const int heads = min(static_cast<int>(section_heads), static_cast<int>(batch_heads) - first);
    const int batch_head = first + in_section % heads;
    return {static_cast<int>(tiles_m) - 1 - in_section / heads, batch_head / num_heads,
            batch_head % num_heads};
  }

  __host__ __device__ int64_t num_tiles() const { return tiles_m * batch_heads; }
};

// `section_bytes` of keys and values may form a section: what stays in L2 while a section runs.
// `packed` query heads share a tile, see QueryBlock.
inline TileSchedule make_schedule(const ForwardParams& params, int block_m, Mask mask, int64_t section_bytes,
                                  int packed = 1) {
  const int64_t batches = int64_t{params.batch} + (params.cu_seqlens_q != nullptr ? 1 : 0);
  TileSchedule schedule{};
  schedule.tiles_m = (int64_t{params.seqlen_q} * packed + block_m - 1) / block_m;
  schedule.num_heads = params.num_heads / packed;
  schedule.batch_heads = batches * schedule.num_heads;
  schedule.section_heads = 1;
  if (mask == Mask::kCausal) {
    const int64_t head_bytes =
        std::max<int64_t>(int64_t{2} * params.seqlen_k * (params.head_dim + params.head_dim_v), 1);
    const int64_t group = schedule.num_heads / params.num_heads_k;
    const int64_t heads = std::max<int64_t>(section_bytes / head_bytes, 1) * group;
    schedule.section_heads = std::min(heads, schedule.batch_heads);
  }
  return schedule;
}

}  // namespace flash_attn
