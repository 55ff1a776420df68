// Attention over a KV cache for GPUs with mma.sync m16n8k16 and cp.async: few queries, many keys, which bound
// it by memory (Flash-Decoding; FlashAttention-2, algorithm 1).
//
// One thread block computes kBlockM rows over one split of the keys. The query heads that share a head of
// keys are packed into the rows. Blocks of K and V arrive in a ring of kStages buffers each:
//
//   barrier  what has arrived   what has been read by then, so that its buffer is refilled
//   first    K[n]               V[n - 1], by V[n - 1 + kStages]
//   second   V[n]               K[n], by K[n + kStages]
//
// Where every warp has keys of its own, a barrier is one of the warp alone; their results are merged at the
// end. Rows that are not aligned for cp.async are loaded and stored by elements, in a kernel of their own:
// what is stored before a barrier has arrived behind it, so that the table holds there too.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/cache/config.cuh"
#include "mma/cache/key_copy.cuh"
#include "mma/cache/merge_warps.cuh"
#include "mma/products.cuh"
#include "ops/append.h"
#include "ops/combine.h"
#include "problem/key_part.cuh"
#include "problem/kv_cache.cuh"
#include "problem/mask.cuh"
#include "problem/query_block.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/accumulator.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/shared_tile.cuh"
#include "warp/softmax.cuh"

namespace flash_attn::mma {

struct SplitArguments {
  CacheParams params;
  int heads;  // of keys
  int tiles_m;
  int group;   // query heads for each head of keys
  int blocks;  // thread blocks for each sequence
};

template <class Config>
__device__ __forceinline__ void load_queries(const QueryBlock& queries, uint32_t shared) {
  using Element = typename Config::Element;
  constexpr int kChunks = Config::kHeadDim / 8, kTotal = Config::kBlockM * kChunks;
  constexpr int kBatch = 2;  // loads of a thread on their way at a time
#pragma unroll 1
  for (int first = threadIdx.x; first < kTotal; first += kBatch * Config::kThreads) {
    uint4 values[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * Config::kThreads, row = at / kChunks, chunk = at % kChunks;
      if (row < queries.rows && chunk * 8 < queries.params->head_dim) {
        values[i] = *reinterpret_cast<const uint4*>(queries.query<Element>(row) + chunk * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * Config::kThreads;
      if (at >= kTotal) break;
      ptx::store_shared_16(shared + SharedTile<Config::kHeadDim>::offset(at / kChunks, at % kChunks),
                           values[i]);
    }
  }
}

// Scale, softcap and ALiBi: the heads of packed rows differ.
template <class Config>
__device__ __forceinline__ void apply_packed_modifiers(Accumulator<Config::kTilesM, Config::kTilesN>& scores,
                                                       const QueryBlock& queries, int diagonal, int row,
                                                       int key) {
  const int lane = threadIdx.x % 32;
  scale_scores(scores, ScoreModifiers(*queries.params, queries.batch, queries.head_of(row)));
#pragma unroll
  for (int i = 0; i < 2 * Config::kTilesM; ++i) {
    const int tile_row = row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    const ScoreModifiers modifiers(*queries.params, queries.batch, queries.head_of(tile_row));
    const int distance = (queries.first_row + tile_row) / queries.group + diagonal - key - 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < Config::kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores[i / 2][n][2 * (i % 2) + c];
        score -= modifiers.bias(distance - n * 8 - c);
      }
    }
  }
}

template <class Config>
__device__ __forceinline__ void barrier() {
  if constexpr (Config::kOwnKeys) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The main loop over this split's blocks of keys, [begin, end). It starts kStages blocks early, to fill the
// ring: one place where K is copied and one where V is, since code that is not in the cache yet costs time
// too.
template <class Config>
__device__ __forceinline__ void attend(const CacheParams& params, const CachedSequence& sequence,
                                       const SplitWork& work, const AttentionMask<Config::kMask>& mask,
                                       const KeyBlocks<Config::kMask, Config::kBlockN>& blocks, int begin,
                                       int end, uint8_t* shared_memory) {
  using Element = typename Config::Element;
  using Shared = SharedTile<Config::kHeadDim>;
  constexpr uint32_t kStageBytes = 2 * Config::kKeyBytes;
  const ForwardParams& forward = params.forward;
  const QueryBlock& queries = work.queries;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Config::kWarpsN * Config::kWarpRows;
  const int warp_key = warp % Config::kWarpsN * Config::kWarpKeys;
  const uint32_t shared = ptx::shared_address(shared_memory), ring = shared + Config::kQueryBytes;

  const int copy_row = Config::kOwnKeys ? warp_key : 0;
  KeyCopy<Config> copy_k(static_cast<const Element*>(forward.k) + queries.head * forward.k_head_stride,
                         forward.k_batch_stride, forward.k_row_stride,
                         Config::kAligned ? forward.head_dim : params.cache_head_dim, copy_row, ring);
  KeyCopy<Config> copy_v(static_cast<const Element*>(forward.v) + queries.head * forward.v_head_stride,
                         forward.v_batch_stride, forward.v_row_stride,
                         Config::kAligned ? forward.head_dim_v : params.cache_head_dim_v, copy_row,
                         ring + Config::kKeyBytes);
  // The kernel before may write the keys that the call appends, but no others.
  const int old_blocks = (sequence.length - sequence.k_row) / Config::kBlockN;
  const auto issue = [&](KeyCopy<Config>& copy, int block, uint32_t ring_offset) {
    if (block >= begin && block < end) {
      if (block >= old_blocks) ptx::wait_for_dependency();
      copy.issue(params, sequence, block, ring_offset);
    }
    ptx::cp_async_commit();
  };

  const FragmentLane a = FragmentLane::of_a(), b = FragmentLane::of_b();
  const uint32_t query_address = shared + Shared::offset(warp_row + a.row, a.chunk);
  const uint32_t key_address = ring + Shared::offset(warp_key + b.row, b.chunk);
  const uint32_t value_address = ring + Config::kKeyBytes + Shared::offset(warp_key + a.row, a.chunk);
  const RowBounds<Config::kTilesM> bounds(mask, queries.first_row + warp_row, queries.group);
  const float scale_log2 = Config::kModifiers ? 1.0f : forward.softmax_scale * kLog2E;
  Accumulator<Config::kTilesM, Config::kTilesD> output = {};
  OnlineSoftmax<Config::kTilesM> softmax;

  uint32_t stage = 0, stage_before = (Config::kStages - 1) * kStageBytes;
#pragma unroll 1
  for (int block = begin - Config::kStages; block < end; ++block) {
    if (block == begin) {
      ptx::wait_for_dependency();
      load_queries<Config>(queries, shared);
      __syncthreads();
    }
    ptx::cp_async_wait<2 * Config::kStages - 2>();
    barrier<Config>();
    issue(copy_v, block + Config::kStages - 1, stage_before);

    Accumulator<Config::kTilesM, Config::kTilesN> scores;
    if (block >= begin) {
      const int key = block * Config::kBlockN + warp_key;
      multiply_rows<Config::kDtype, Config::kHeadDim>(scores, query_address, key_address + stage);
      if constexpr (Config::kModifiers) {
        apply_packed_modifiers<Config>(scores, queries, mask.diagonal, warp_row, key);
      }
      if (blocks.needs_mask(block)) bounds.apply(scores, key);

      float block_max[2 * Config::kTilesM];
      softmax.block_max(block_max, scores);
      if (__any_sync(0xffffffff, softmax.lags(block_max, scale_log2))) {
        float factor[2 * Config::kTilesM];
        softmax.advance(factor, block_max, scale_log2);
        softmax.rescale(output, factor);
      }
      softmax.exponentiate(scores, scale_log2);
      ptx::cp_async_wait<2 * Config::kStages - 2>();
      barrier<Config>();
    }
    issue(copy_k, block + Config::kStages, stage);
    if (block >= begin) {
      accumulate_output<Config::kDtype, Config::kHeadDim, Config::kTilesN / 2>(output, scores,
                                                                               value_address + stage);
    }
    stage_before = stage;
    stage = stage == (Config::kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }

  float inverse_sum[2 * Config::kTilesM];
  softmax.finish(inverse_sum, [](float (&)[2 * Config::kTilesM]) {});
  ptx::cp_async_wait<0>();
  __syncthreads();
  WarpResults<Config> results(shared_memory);
  results.write(output, softmax, warp % Config::kWarpsN, warp_row);
  __syncthreads();
  store_merged(params, work, results, scale_log2);
}

// Heads run fastest, since their keys lie side by side in memory; then tiles of queries, which share keys.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    split_kernel(const __grid_constant__ SplitArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  ptx::launch_dependents();
  const CacheParams& params = arguments.params;
  // What leads to the length comes first: reading it takes longest.
  const int batch = blockIdx.x / arguments.blocks;
  prefetch_block_table(params, batch);
  const CachedSequence sequence(params, batch);
  const int index = blockIdx.x - batch * arguments.blocks;
  const int head = index % arguments.heads, rest = index / arguments.heads;
  const int split = rest / arguments.tiles_m, m_block = rest - split * arguments.tiles_m;
  const int64_t total_rows = int64_t{sequence.seqlen_q} * arguments.group;
  const int step = sequence.batch == params.forward.batch ? arguments.tiles_m * Config::kBlockM : 0;

  for (int64_t first_row = int64_t{m_block} * Config::kBlockM; first_row < total_rows; first_row += step) {
    const int rows = static_cast<int>(min(total_rows - first_row, int64_t{Config::kBlockM}));
    const SplitWork work{
        {&params.forward, sequence, sequence.batch, head, arguments.group, static_cast<int>(first_row), rows},
        split,
        params.num_splits};
    const AttentionMask<Config::kMask> mask(params.forward, sequence.seqlen_q, sequence.seqlen_k);
    const int first_query = work.queries.first_row / arguments.group;
    const int last_query = (work.queries.first_row + rows - 1) / arguments.group;
    const KeyBlocks<Config::kMask, Config::kBlockN> blocks(mask, first_query, last_query);
    const int per_split = (max(blocks.end - blocks.begin, 0) + work.num_splits - 1) / work.num_splits;
    const int begin = blocks.begin + split * per_split, end = min(blocks.end, begin + per_split);
    if (begin < end) {
      attend<Config>(params, sequence, work, mask, blocks, begin, end, shared_memory);
    } else {
      ptx::wait_for_dependency();  // what comes after this kernel counts on what came before it
      store_no_keys<typename Config::Element>(params, work, threadIdx.x, Config::kThreads);
    }
    if (step == 0) return;
  }
}

}  // namespace flash_attn::mma
