// Forward attention for GPUs with mma.sync m16n8k16 and cp.async (Ampere and later); FlashAttention-2,
// algorithm 1.
//
// One thread block computes kBlockM rows of O for one head. Its warps split the rows; all of them read the
// same K and V.
//
// K and V have one buffer each; two thread blocks per multiprocessor hide each other's waits. Two barriers a
// block of keys:
//
//   barrier  what has arrived   what every warp has read, so that its buffer is refilled next
//   first    K[n] (and Q)       V[n + 1]
//   second   V[n]               K[n]
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/forward/config.cuh"
#include "mma/forward/warp_pair.cuh"
#include "mma/products.cuh"
#include "problem/mask.cuh"
#include "problem/query_block.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/accumulator.cuh"
#include "warp/dropout.cuh"
#include "warp/scores.cuh"
#include "warp/shared_tile.cuh"
#include "warp/softmax.cuh"
#include "warp/store_tile.cuh"

namespace flash_attn::mma {

struct ForwardArguments {
  ForwardParams params;
  TileSchedule schedule;
};

// O += P V for a block of keys. A pair multiplies each warp's probabilities with its own half of the columns
// of V, then the other's, which have arrived meanwhile.
template <class Config>
__device__ __forceinline__ void accumulate_block(Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                                 const Accumulator<Config::kTilesM, Config::kTilesN>& probs,
                                                 uint32_t value_address, const WarpPart<Config>& part,
                                                 const WarpPair<Config>& pair) {
  constexpr int kSteps = Config::kTilesN / 2;
  if constexpr (Config::kPairs) {
    RoundedProbs<Config::kTilesM, Config::kTilesN> rounded;
    round_probs<Config::kDtype>(rounded, probs);
    pair.send(rounded);
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(output, rounded, value_address);
    pair.receive(rounded);
    const int rows_to_other = Config::kWarpKeys - 2 * part.key;
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(
        output, rounded, value_address + rows_to_other * SharedTile<Config::kHeadDim>::kRowBytes);
  } else {
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(output, probs, value_address);
  }
}

// The epilogue: completes the sums, writes LSE and the normalised O.
template <class Config, bool kModifiers>
__device__ __forceinline__ void finish(const QueryBlock& queries, const WarpPart<Config>& part,
                                       const WarpPair<Config>& pair, OnlineSoftmax<Config::kTilesM>& softmax,
                                       const Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                       float scale_log2, uint32_t shared) {
  float factor[2 * Config::kTilesM];
  softmax.finish(factor, [&](float (&row_sum)[2 * Config::kTilesM]) {
    if constexpr (Config::kPairs) pair.combine_rows(row_sum, [](float a, float b) { return a + b; });
  });
  const bool stores_lse = queries.params->softmax_lse != nullptr && threadIdx.x % 4 == 0 && part.key == 0;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * Config::kTilesM; ++i) {
    const int row = part.row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    float lse = softmax.log_sum_exp(i, scale_log2);
    if (queries.params->sinks != nullptr) factor[i] *= add_sink(lse, queries.params->sinks[queries.head]);
    if (stores_lse && row < queries.rows) *queries.lse(row) = lse;
    if constexpr (kModifiers) factor[i] *= queries.params->dropout_rescale;
  }
  store_tile<Config::kDtype, Config::kHeadDim>(
      shared, output, factor, part.row, part.dim, queries.rows, queries.params->head_dim_v,
      [&](int row) { return queries.out<typename Config::Element>(row); });
}

// One step of the online softmax: `scores` become probabilities. The second barrier, with `refill_keys`
// behind it, comes as early as it may. Pairs of warps must agree whether maxima lag and learn it from that
// barrier, which then follows the maxima.
template <class Config, class RefillKeys>
__device__ __forceinline__ void update_softmax(OnlineSoftmax<Config::kTilesM>& softmax,
                                               Accumulator<Config::kTilesM, Config::kTilesN>& scores,
                                               Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                               float scale_log2, const WarpPair<Config>& pair,
                                               RefillKeys refill_keys) {
  ptx::cp_async_wait<0>();
  if constexpr (!Config::kPairs) {
    __syncthreads();
    refill_keys();
  }
  float block_max[2 * Config::kTilesM];
  softmax.block_max(block_max, scores);
  bool lags = softmax.lags(block_max, scale_log2);
  if constexpr (Config::kPairs) {
    lags = __syncthreads_or(lags);
    refill_keys();
  } else {
    lags = __any_sync(0xffffffff, lags);
  }
  if (lags) {
    if constexpr (Config::kPairs) pair.combine_rows(block_max, fmaxf);
    float factor[2 * Config::kTilesM];
    softmax.advance(factor, block_max, scale_log2);
    softmax.rescale(output, factor);
  }
  softmax.exponentiate(scores, scale_log2);
}

// The main loop: from the last block of keys to the first.
template <class Config, bool kModifiers>
__device__ __forceinline__ void attend(const QueryBlock& queries, uint8_t* shared_memory) {
  using Element = typename Config::Element;
  using CopyQuery = TileCopy<Element, Config::kBlockM, Config::kHeadDim, Config::kThreads>;
  using CopyKeys = TileCopy<Element, Config::kBlockN, Config::kHeadDim, Config::kThreads>;
  const ForwardParams& params = *queries.params;
  const int seqlen_k = queries.sequence.seqlen_k;

  const AttentionMask<Config::kMask> mask(params, queries.sequence.seqlen_q, seqlen_k);
  const KeyBlocks<Config::kMask, Config::kBlockN> blocks(mask, queries.first_row,
                                                         queries.first_row + queries.rows - 1);
  if (blocks.begin >= blocks.end) return store_empty<Element>(queries, threadIdx.x, Config::kThreads);

  const int key_head = queries.head / (params.num_heads / params.num_heads_k);
  const uint32_t shared = ptx::shared_address(shared_memory);
  const uint32_t shared_k = shared + Config::kQueryBytes;
  CopyKeys copy_k(shared_k, queries.sequence.k_rows<Element>(params, key_head), params.k_row_stride);
  CopyKeys copy_v(shared_k + Config::kKeyBytes, queries.sequence.v_rows<Element>(params, key_head),
                  params.v_row_stride);
  const auto issue = [&](CopyKeys& copy, int64_t row_stride, int head_dim, int block) {
    copy.issue(row_stride, seqlen_k - block * Config::kBlockN, head_dim);
    copy.move(-1, row_stride);
    ptx::cp_async_commit();
  };

  int block = blocks.end - 1;
  copy_k.move(block, params.k_row_stride);
  copy_v.move(block, params.v_row_stride);
  CopyQuery(shared, queries.query<Element>(), params.q_row_stride)
      .issue(params.q_row_stride, queries.rows, params.head_dim);
  issue(copy_k, params.k_row_stride, params.head_dim, block);

  const WarpPart<Config> part;
  const FragmentAddresses<Config> addresses(shared, part);
  const WarpPair<Config> pair(shared_memory + Config::kQueryBytes + 2 * Config::kKeyBytes);
  Accumulator<Config::kTilesM, Config::kTilesD> output = {};
  OnlineSoftmax<Config::kTilesM> softmax;
  const float scale_log2 = kModifiers ? 1.0f : params.softmax_scale * kLog2E;

  for (; block >= blocks.begin; --block) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    issue(copy_v, params.v_row_stride, params.head_dim_v, block);

    Accumulator<Config::kTilesM, Config::kTilesN> scores;
    const int row = queries.first_row + part.row, key = block * Config::kBlockN + part.key;
    multiply_rows<Config::kDtype, Config::kHeadDim>(scores, addresses.query, addresses.key);
    if constexpr (kModifiers) {
      apply_modifiers(scores, ScoreModifiers(params, queries.batch, queries.head), mask.diagonal, row, key);
    }
    if (blocks.needs_mask(block)) apply_mask(scores, mask, row, key);

    update_softmax<Config>(softmax, scores, output, scale_log2, pair, [&] {
      if (block > blocks.begin) issue(copy_k, params.k_row_stride, params.head_dim, block - 1);
    });
    if constexpr (kModifiers) {
      if (params.dropout_p > 0.0f) {
        apply_dropout(scores, Dropout(params, queries.batch * params.num_heads + queries.head), row, key);
      }
    }
    accumulate_block(output, scores, addresses.value, part, pair);
  }
  finish<Config, kModifiers>(queries, part, pair, softmax, output, scale_log2, shared);
}

template <class Config, bool kModifiers>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const ForwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const Sequence sequence(params, tile.batch);
  const auto queries = [&](int first_row) {
    const int rows = min(sequence.seqlen_q - first_row, Config::kBlockM);
    return QueryBlock{&params, sequence, tile.batch, tile.head, 1, first_row, rows};
  };
  const int first_row = tile.m_block * Config::kBlockM;
  if (tile.batch == params.batch) {
    // The rows past the last varlen sequence may be more than the tiles of the longest sequence.
    const int64_t step = arguments.schedule.tiles_m * Config::kBlockM;
    for (int64_t row = first_row; row < sequence.seqlen_q; row += step) {
      store_empty<typename Config::Element>(queries(row), threadIdx.x, Config::kThreads);
    }
  } else if (first_row < sequence.seqlen_q) {
    attend<Config, kModifiers>(queries(first_row), shared_memory);
  }
}

}  // namespace flash_attn::mma
