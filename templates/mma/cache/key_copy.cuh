// Copies of blocks of K or V from a KV cache, page by page, into a ring of shared tiles: with cp.async, or
// where rows are not aligned for it, by elements.
#pragma once

#include <cstdint>

#include "problem/kv_cache.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/elements.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

// With pages, each lane knows where one group of kKeyGroup keys lies: the block table is read once for 32
// groups.
template <class Config, bool kAligned>
class KeyCopy {
 public:
  using Element = typename Config::Element;

  // Key 0 of the cache's first row or page is at `base`; this warp, or all of them together, copy rows from
  // `first_row` on to the tile at `shared`.
  __device__ __forceinline__ KeyCopy(const Element* base, int64_t batch_stride, int64_t row_stride,
                                     int head_dim, int first_row, uint32_t shared)
      : source_(base + chunk() * 8),
        batch_stride_(batch_stride),
        row_stride_(row_stride),
        head_dim_(head_dim),
        first_row_(first_row),
        shared_(shared) {}

  // Blocks must be asked for in ascending order. Keys past the sequence or outside the cache become zeros, so
  // that no stray NaN meets the tensor cores.
  __device__ __forceinline__ void issue(const CacheParams& params, const CachedSequence& sequence, int block,
                                        uint32_t ring_offset) {
    if (params.page_size > 0 && block >= located_end_) locate_groups(params, sequence, block);
    const int valid_rows = sequence.seqlen_k - block * Config::kBlockN - first_row_;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass += kPassesPerGroup) {
      const KeyLocation at = locate(params, sequence, block, (pass * kRowsPerPass + row()) / kKeyGroup);
      const Element* source =
          source_ + at.page_or_batch * batch_stride_ + (at.row + row() % kKeyGroup) * row_stride_;
#pragma unroll
      for (int i = 0; i < kPassesPerGroup; ++i) {
        const int tile_row = (pass + i) * kRowsPerPass + row();
        copy_row(source + i * kRowsPerPass * row_stride_, tile_row,
                 at.page_or_batch >= 0 && tile_row < valid_rows, ring_offset);
      }
    }
  }

 private:
  using Tile = SharedTile<Config::kHeadDim>;
  static constexpr int kRowsPerPass = Config::kCopyThreads / Tile::kSlabChunks;
  static constexpr int kPasses = Config::kCopyRows / kRowsPerPass;
  static constexpr int kPassesPerGroup = kRowsPerPass < kKeyGroup ? kKeyGroup / kRowsPerPass : 1;
  static constexpr int kGroups = Config::kCopyRows / kKeyGroup;
  static constexpr int kLocatedBlocks = 32 / kGroups;
  static_assert(Config::kCopyRows % kRowsPerPass == 0 && 32 % kGroups == 0);

  __device__ static __forceinline__ int copier() { return threadIdx.x % Config::kCopyThreads; }
  __device__ static __forceinline__ int chunk() { return copier() % Tile::kSlabChunks; }
  __device__ static __forceinline__ int row() { return copier() / Tile::kSlabChunks; }

  // Where a group of the block lies that this thread copies from.
  __device__ __forceinline__ KeyLocation locate(const CacheParams& params, const CachedSequence& sequence,
                                                int block, int group) const {
    if (params.page_size == 0) {
      return {sequence.cache_row, sequence.k_row + block * Config::kBlockN + first_row_ + group * kKeyGroup};
    }
    const int lane = (block - (located_end_ - kLocatedBlocks)) * kGroups + group;
    return {__shfl_sync(0xffffffff, located_.page_or_batch, lane),
            __shfl_sync(0xffffffff, located_.row, lane)};
  }

  __device__ __forceinline__ void locate_groups(const CacheParams& params, const CachedSequence& sequence,
                                                int block) {
    const int lane = threadIdx.x % 32;
    const int key = (block + lane / kGroups) * Config::kBlockN + first_row_ + lane % kGroups * kKeyGroup;
    located_ = key < sequence.seqlen_k ? locate_key(params, sequence, key) : KeyLocation{-1, 0};
    located_end_ = block + kLocatedBlocks;
  }

  __device__ __forceinline__ void copy_row(const Element* source, int tile_row, bool row_valid,
                                           uint32_t ring_offset) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const bool valid = row_valid && (slab * Tile::kSlabChunks + chunk()) * 8 < head_dim_;
        ptx::cp_async_16(destination(tile_row, slab, ring_offset), source + slab * Tile::kSlabChunks * 8,
                         valid);
      }
    } else {
      copy_elements(source, row_valid ? head_dim_ - chunk() * 8 : 0, tile_row, ring_offset);
    }
  }

  // Loads, then stores, which are done at once: after the next barrier other threads see them, as they see
  // copies that were waited for before it. `source` has that many elements of the row.
  __device__ __forceinline__ void copy_elements(const Element* source, int elements, int tile_row,
                                                uint32_t ring_offset) const {
    uint4 values[Tile::kSlabs];
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      const int first = slab * Tile::kSlabChunks * 8;
      values[slab] = load_elements(source + first, elements - first);
    }
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
      ptx::store_shared_16(destination(tile_row, slab, ring_offset), values[slab]);
    }
  }

  __device__ __forceinline__ uint32_t destination(int tile_row, int slab, uint32_t ring_offset) const {
    return shared_ + ring_offset + Tile::offset(first_row_ + tile_row, slab * Tile::kSlabChunks + chunk());
  }

  const Element* source_;
  int64_t batch_stride_;
  int64_t row_stride_;
  int head_dim_;
  int first_row_;
  uint32_t shared_;
  KeyLocation located_{-1, 0};
  int located_end_ = 0;
};

}  // namespace flash_attn::mma
