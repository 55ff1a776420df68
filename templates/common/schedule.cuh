// Which tile of queries a thread block works on.
//
// The grid is one-dimensional, so that batch x heads may exceed 65,535. Heads come in sections whose keys and
// values fit into L2 together; inside a section the last, under a causal mask longest, tiles of all heads run
// first.
#pragma once

#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace flash_attn {

struct TileSchedule {
  int tiles_m;        // tiles of queries per head
  int batch_heads;    // batch entries x query heads
  int section_heads;  // of these, how many form a section
  int num_heads;

  struct Tile {
    int m_block;
    int batch;
    int head;
  };

  __device__ Tile tile(int index) const {
    const int section = index / (section_heads * tiles_m);
    const int in_section = index - section * section_heads * tiles_m;
    const int first = section * section_heads;
    const int heads = min(section_heads, batch_heads - first);
    const int batch_head = first + in_section % heads;
    return {tiles_m - 1 - in_section / heads, batch_head / num_heads, batch_head % num_heads};
  }

  __host__ int64_t num_tiles() const { return static_cast<int64_t>(tiles_m) * batch_heads; }
};

// Bytes of keys and values that a section may hold: half of the smallest L2 of interest (A100: 40 MB).
constexpr int64_t kSectionBytes = int64_t{16} << 20;

inline __host__ TileSchedule make_schedule(const ForwardParams& params, int block_m, Mask mask) {
  const int batches = params.batch + (params.cu_seqlens_q != nullptr ? 1 : 0);
  TileSchedule schedule{};
  schedule.tiles_m = (params.seqlen_q + block_m - 1) / block_m;
  schedule.num_heads = params.num_heads;
  schedule.batch_heads = batches * params.num_heads;
  schedule.section_heads = 1;
  if (mask == Mask::kCausal) {
    const int64_t head_bytes = std::max<int64_t>(int64_t{4} * params.seqlen_k * params.head_dim, 1);
    const int64_t group = params.num_heads / params.num_heads_k;
    const int64_t heads = std::max<int64_t>(kSectionBytes / head_bytes, 1) * group;
    schedule.section_heads = static_cast<int>(std::min<int64_t>(heads, schedule.batch_heads));
  }
  return schedule;
}

}  // namespace flash_attn
