// Contiguous K and V, of which a call takes every sequence: the key source (wgmma/key_source.cuh) of the
// forward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "problem/work.cuh"
#include "ptx/tensor_copy.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/epilogue.cuh"
#include "wgmma/key_source.cuh"

namespace flash_attn::wgmma {

struct TensorKeys {
  static constexpr int kProducers = 1;
  static constexpr bool kDropout = true;
  TensorMaps maps;
  ForwardParams params;
  TileSchedule schedule;
  int group;

  __host__ __device__ const ForwardParams& forward() const { return params; }
  __host__ __device__ int64_t num_tiles() const { return schedule.num_tiles(); }
  __device__ static constexpr int key_parts() { return 1; }
  __device__ TileSchedule::Tile tile(int index) const { return schedule.tile(index); }
  __device__ Sequence sequence(int batch) const { return Sequence(params, batch); }
  // Rows past the end of a sequence may be another's, or not initialised.
  __device__ bool has_rows_behind() const {
    return params.cu_seqlens_q != nullptr || params.seqused_k != nullptr;
  }
  KeyTensor tensor(int block_n) const {
    const bool varlen = params.cu_seqlens_q != nullptr;
    return {varlen ? params.total_k : params.seqlen_k, varlen ? 1 : params.batch, block_n};
  }

  struct Location {
    int batch;
    int row;
  };
  template <class Config>
  __device__ __forceinline__ Location locate(const Sequence& sequence, int block) const {
    return {sequence.k_batch, sequence.k_row + block * Config::kBlockN};
  }
  template <class Config, int kSlabs>
  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t shared, uint32_t barrier,
                                       const Location& keys, int key_head) const {
#pragma unroll
    for (int slab = 0; slab < kSlabs; ++slab) {
      ptx::copy_tensor(shared + slab * Config::kKeySlabBytes, map, barrier, slab * 64, keys.row, key_head,
                       keys.batch);
    }
  }

  template <class Config, class Scores>
  __device__ __forceinline__ void store(const QueryBlock& queries, int, const Scores& policy,
                                        OnlineSoftmax<1>& softmax,
                                        const Accumulator<1, Config::kTilesD>& output) const {
    store_rows<Config>(queries, policy, softmax, output);
  }
  template <class Element>
  __device__ __forceinline__ void store_no_keys(const QueryBlock& queries, int, int thread,
                                                int threads) const {
    store_empty_rows<Element>(queries, thread, threads);
  }
};

}  // namespace flash_attn::wgmma
