// Keys of a KV cache, in a row of it or in pages: the key source (wgmma/key_source.cuh) of a call over a
// cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/kv_cache.cuh"
#include "problem/schedule.cuh"
#include "problem/work.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/tensor_copy.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/epilogue.cuh"
#include "wgmma/key_source.cuh"

namespace flash_attn::wgmma {

// Lanes of the producer's warps copy boxes of `box_rows` keys that lie side by side, 64 columns each, so that
// places in the block table are read at the same time.
struct CacheKeys {
  static constexpr int kProducers = 64;
  static constexpr bool kDropout = false;
  TensorMaps maps;
  CacheParams params;
  TileSchedule schedule;
  int group;
  int box_rows;
  int boxes;  // of a block of keys

  __host__ __device__ const ForwardParams& forward() const { return params.forward; }
  __host__ __device__ int64_t num_tiles() const { return schedule.num_tiles() * params.num_splits; }
  __device__ int key_parts() const { return params.num_splits; }
  __device__ TileSchedule::Tile tile(int index) const {
    TileSchedule::Tile tile = schedule.tile(index / params.num_splits);
    tile.key_part = index % params.num_splits;
    return tile;
  }
  __device__ CachedSequence sequence(int batch) const { return CachedSequence(params, batch); }
  __device__ bool has_rows_behind() const { return true; }
  KeyTensor tensor(int) const {
    return {params.page_size > 0 ? params.page_size : params.forward.seqlen_k, params.cache_entries,
            box_rows};
  }

  template <class Config>
  __device__ __forceinline__ KeyLocation locate(const CachedSequence& sequence, int block) const {
    const int box = min(static_cast<int>(threadIdx.x % 32) / Config::kSlabs, boxes - 1);
    return look_up_key(params, sequence, block * Config::kBlockN + box * box_rows);
  }
  // A row or page outside the cache has the number -1, which lies outside the tensor: it arrives as zeros.
  // The entry of the block table is looked at here and not earlier, so that no other warp waits for it.
  template <class Config, int kSlabs>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t shared, uint32_t barrier,
                                       const KeyLocation& keys, int key_head) const {
    static_assert(Config::kBlockN / kKeyGroup * Config::kSlabs <= 32, "a lane copies one box");
    const int lane = threadIdx.x % 32, box = lane / Config::kSlabs, slab = lane % Config::kSlabs;
    if (box >= boxes || slab >= kSlabs) return;
    ptx::copy_tensor(shared + slab * Config::kKeySlabBytes + box * box_rows * 128, map, barrier, slab * 64,
                     keys.row, key_head, existing_page(params, keys.page_or_batch));
  }

  template <class Config, class Scores>
  __device__ __forceinline__ void store(const QueryBlock& queries, int key_part, const Scores& policy,
                                        OnlineSoftmax<1>& softmax,
                                        const Accumulator<1, Config::kTilesD>& output) const {
    if (params.num_splits == 1) return store_rows<Config>(queries, policy, softmax, output);
    ptx::launch_dependents();  // merging gets ready
    store_partial_rows<Config>(params, queries, KeyPart{key_part, params.num_splits}, policy, softmax,
                               output);
  }
  template <class Element>
  __device__ __forceinline__ void store_no_keys(const QueryBlock& queries, int key_part, int thread,
                                                int threads) const {
    flash_attn::store_no_keys<Element>(params, queries, KeyPart{key_part, params.num_splits}, thread,
                                       threads);
  }
};

}  // namespace flash_attn::wgmma
