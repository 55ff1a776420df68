// Where Hopper's forward kernel finds the keys of a KV cache, in a row of it or in pages, and where its
// results go: the key source (wgmma/key_source.cuh) of a call over a cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/key_part.cuh"
#include "problem/kv_cache.cuh"
#include "problem/schedule.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/tensor_copy.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/epilogue.cuh"
#include "wgmma/tensors.cuh"

namespace flash_attn::wgmma {

// Lanes of the producer's warps copy boxes of `box_rows` keys that lie side by side, 64 columns each, so that
// places in the block table are read at the same time.
struct CacheArguments {
  static constexpr int kProducers = 64;  // threads: a warp for Q and K, and one for V
  TensorMaps maps;
  CacheParams params;
  TileSchedule schedule;
  int group;  // query heads that share keys, kPacked only
  int box_rows;
  int boxes;  // of a block of keys

  __host__ __device__ const ForwardParams& forward() const { return params.forward; }
  __host__ __device__ int64_t num_tiles() const { return schedule.num_tiles() * params.num_splits; }
  __device__ int num_splits() const { return params.num_splits; }
  __device__ TileSchedule::Tile tile(int index) const {
    TileSchedule::Tile tile = schedule.tile(index / params.num_splits);
    tile.split = index % params.num_splits;
    return tile;
  }
  __device__ CachedSequence sequence(int batch) const { return CachedSequence(params, batch); }
  __device__ bool has_rows_behind() const { return true; }
  KeyTensor keys(int) const {
    return {params.page_size > 0 ? params.page_size : params.forward.seqlen_k, params.cache_entries,
            box_rows};
  }

  template <class Config>
  __device__ __forceinline__ KeyLocation locate(const CachedSequence& sequence, int block) const {
    const int box = min(static_cast<int>(threadIdx.x % 32) / Config::kSlabs, boxes - 1);
    return look_up_key(params, sequence, block * Config::kBlockN + box * box_rows);
  }
  // Entry -1, a row or page outside the cache, lies outside the tensor: it arrives as zeros. Which it is is
  // asked here, so that nobody waits for the block table before.
  template <class Config, int kSlabs>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t shared, uint32_t barrier,
                                       const KeyLocation& at, int key_head) const {
    static_assert(Config::kBlockN / kKeyGroup * Config::kSlabs <= 32, "a lane copies one box");
    const int lane = threadIdx.x % 32, box = lane / Config::kSlabs, slab = lane % Config::kSlabs;
    if (box >= boxes || slab >= kSlabs) return;
    ptx::copy_tensor(shared + slab * Config::kKeySlabBytes + box * box_rows * 128, map, barrier, slab * 64,
                     at.row, key_head, existing_entry(params, at.entry));
  }

  template <class Config, bool kModifiers>
  __device__ __forceinline__ void finish(const SplitWork& work, OnlineSoftmax<1>& softmax,
                                         const Accumulator<1, Config::kTilesD>& output,
                                         float scale_log2) const {
    if (work.num_splits == 1) {
      return wgmma::finish<Config, kModifiers>(work.queries, softmax, output, scale_log2);
    }
    ptx::launch_dependents();  // merging gets ready
    finish_part<Config>(params, work, softmax, output, scale_log2);
  }
  template <class Element>
  __device__ __forceinline__ void store_no_keys(const SplitWork& work, int thread) const {
    flash_attn::store_no_keys<Element>(params, work, thread, 128);
  }
};

}  // namespace flash_attn::wgmma
