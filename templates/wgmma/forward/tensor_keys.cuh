// What the forward kernel is told of a call whose keys lie in tensors: how to find and copy them, and what to
// do with results. CacheArguments (wgmma/cache/launch.cuh) does the same for a KV cache.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/key_part.cuh"
#include "problem/kv_cache.cuh"
#include "problem/query_block.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "ptx/tensor_copy.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/epilogue.cuh"
#include "wgmma/tensors.cuh"

namespace flash_attn::wgmma {

struct ForwardArguments {
  static constexpr int kProducers = 1;  // threads
  TensorMaps maps;
  ForwardParams params;
  TileSchedule schedule;
  int group;  // query heads that share keys, kPacked only

  __host__ __device__ const ForwardParams& forward() const { return params; }
  __host__ __device__ int64_t num_tiles() const { return schedule.num_tiles(); }
  __device__ static constexpr int num_splits() { return 1; }
  __device__ TileSchedule::Tile tile(int index) const { return schedule.tile(index); }
  __device__ Sequence sequence(int batch) const { return Sequence(params, batch); }
  // Rows past the end of a sequence may be another's, or not initialised.
  __device__ bool has_rows_behind() const {
    return params.cu_seqlens_q != nullptr || params.seqused_k != nullptr;
  }
  KeyTensor keys(int block_n) const {
    const bool varlen = params.cu_seqlens_q != nullptr;
    return {varlen ? params.total_k : params.seqlen_k, varlen ? 1 : params.batch, block_n};
  }

  template <class Config>
  __device__ __forceinline__ KeyLocation locate(const Sequence& sequence, int block) const {
    return {sequence.k_batch, sequence.k_row + block * Config::kBlockN};
  }
  // K or V.
  template <class Config, int kSlabs>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t shared, uint32_t barrier,
                                       const KeyLocation& at, int key_head) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      ptx::copy_tensor(shared + slab * Config::kKeySlabBytes, map, barrier, slab * 64, at.row, key_head,
                       at.entry);
    }
  }

  // The results of a consumer warpgroup.
  template <class Config, bool kModifiers>
  __device__ __forceinline__ void finish(const SplitWork& work, OnlineSoftmax<1>& softmax,
                                         const Accumulator<1, Config::kTilesD>& output,
                                         float scale_log2) const {
    wgmma::finish<Config, kModifiers>(work.queries, softmax, output, scale_log2);
  }
  // Those of rows that see no key; `thread` is one of the warpgroup.
  template <class Element>
  __device__ __forceinline__ void store_no_keys(const SplitWork& work, int thread) const {
    store_empty<Element>(work.queries, thread, 128);
  }
};

}  // namespace flash_attn::wgmma
