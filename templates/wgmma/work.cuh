// The tiles of queries that a thread block computes, and what each of its warpgroups has to do of one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/mask.cuh"
#include "problem/query_block.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "wgmma/forward/config.cuh"

namespace flash_attn::wgmma {

// The kernels of one configuration: softmax(scale Q K^T) V; with score modifiers; with a group of query heads
// packed into the rows of a tile, for calls with few queries.
enum class Variant { kPlain, kModified, kPacked };

template <Variant kVariant, class Arguments>
__device__ __forceinline__ int packed_group(const Arguments& arguments) {
  return kVariant == Variant::kPacked ? arguments.group : 1;
}

// The rows of a tile, or one warpgroup's 64 of them, and the blocks of keys that they see. `group` query
// heads are packed.
template <class Config>
struct Work {
  QueryBlock queries;
  AttentionMask<Config::kMask> mask;
  KeyBlocks<Config::kMask, Config::kBlockN> blocks;

  __device__ __forceinline__ Work(const ForwardParams& params, const Sequence& sequence,
                                  const TileSchedule::Tile& tile, int group, int first_row, int max_rows)
      : queries{&params,
                sequence,
                tile.batch,
                tile.head,
                group,
                first_row,
                static_cast<int>(min(int64_t{sequence.seqlen_q} * group - first_row, int64_t{max_rows}))},
        mask(params, sequence.seqlen_q, sequence.seqlen_k, group),
        blocks(mask, first_row, first_row + queries.rows - 1) {
    if (queries.rows <= 0 || blocks.begin > blocks.end) blocks.end = blocks.begin;
  }

  // Keeps one of several parts of the keys.
  __device__ __forceinline__ void keep_part(int split, int num_splits) {
    const int blocks_each = (blocks.end - blocks.begin + num_splits - 1) / num_splits;
    const int begin = blocks.begin + split * blocks_each;
    keep(begin, begin + blocks_each);
  }
  __device__ __forceinline__ void keep(int begin, int end) {
    blocks.begin = max(blocks.begin, begin);
    blocks.end = max(min(blocks.end, end), blocks.begin);
  }

  __device__ __forceinline__ bool has_keys() const { return blocks.begin < blocks.end; }
};

// Hands out tiles to threads, one or a warp: the first one of each thread block is its own index, the next
// ones come from a counter in global memory, so that blocks with short tiles take more of them. Without a
// counter a block takes every gridDim.x-th tile.
template <int kThreads>
struct TileQueue {
  int32_t* counter;
  int num_tiles;

  __device__ __forceinline__ int next(int index) const {
    if (counter == nullptr) return index + gridDim.x;
    int taken = 0;
    if (kThreads == 1 || threadIdx.x == 0) {
      taken = atomicAdd(counter, 1);
      if (taken == num_tiles - 1) *counter = 0;  // every tile's successor has been asked for
    }
    if (kThreads > 1) taken = __shfl_sync(0xffffffff, taken, 0);
    return taken + gridDim.x;
  }
};

}  // namespace flash_attn::wgmma
