// Forward attention by mma.sync and cp.async; FlashAttention-2, algorithm 1. Read from forward_kernel at the
// end upwards: kernel, loop, its steps.
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

#include <cstdint>

#include "mma/forward/config.cuh"
#include "mma/forward/warp_pair.cuh"
#include "mma/products.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "problem/work.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/accumulator.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/shared_tile.cuh"
#include "warp/softmax.cuh"
#include "warp/store_tile.cuh"

namespace flash_attn::mma {

struct ForwardArguments {
  ForwardParams params;
  TileSchedule schedule;
};

// The copies of K and V, block by block from the last to the first.
template <class Config>
struct KeyCopies {
  using Copy = TileCopy<typename Config::Element, Config::kBlockN, Config::kHeadDim, Config::kThreads>;
  const ForwardParams& params;
  int seqlen_k;
  Copy k;
  Copy v;

  __device__ __forceinline__ KeyCopies(const QueryBlock& queries, uint32_t shared, int last_block)
      : params(*queries.params),
        seqlen_k(queries.sequence.seqlen_k),
        k(shared, queries.sequence.k_rows<typename Config::Element>(params, key_head(queries)),
          params.k_row_stride),
        v(shared + Config::kKeyBytes,
          queries.sequence.v_rows<typename Config::Element>(params, key_head(queries)), params.v_row_stride) {
    k.move(last_block, params.k_row_stride);
    v.move(last_block, params.v_row_stride);
  }

  __device__ __forceinline__ void issue_keys(int block) {
    issue(k, params.k_row_stride, params.head_dim, block);
  }
  __device__ __forceinline__ void issue_values(int block) {
    issue(v, params.v_row_stride, params.head_dim_v, block);
  }

 private:
  __device__ static __forceinline__ int key_head(const QueryBlock& queries) {
    return queries.head / (queries.params->num_heads / queries.params->num_heads_k);
  }
  __device__ __forceinline__ void issue(Copy& copy, int64_t row_stride, int head_dim, int block) const {
    copy.issue(row_stride, seqlen_k - block * Config::kBlockN, head_dim);
    copy.move(-1, row_stride);
    ptx::cp_async_commit();
  }
};

// O += P V for a block of keys. A pair multiplies each warp's probabilities with its own half of the columns
// of V, then the other's, which have arrived meanwhile.
template <class Config>
__device__ __forceinline__ void accumulate_block(Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                                 const Accumulator<Config::kTilesM, Config::kTilesN>& probs,
                                                 uint32_t value_address, const WarpShare<Config>& share,
                                                 const WarpPair<Config>& pair) {
  constexpr int kSteps = Config::kTilesN / 2;
  if constexpr (Config::kPairs) {
    RoundedProbs<Config::kTilesM, Config::kTilesN> rounded;
    round_probs<Config::kDtype>(rounded, probs);
    pair.send(rounded);
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(output, rounded, value_address);
    pair.receive(rounded);
    const int rows_to_other = Config::kWarpKeys - 2 * share.key;
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(
        output, rounded, value_address + rows_to_other * SharedTile<Config::kHeadDim>::kRowBytes);
  } else {
    accumulate_output<Config::kDtype, Config::kHeadDim, kSteps>(output, probs, value_address);
  }
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

// The epilogue: completes the sums, writes LSE and the normalised O.
template <class Config, class Scores>
__device__ __forceinline__ void store_rows(const QueryBlock& queries, const Scores& policy,
                                           const WarpShare<Config>& share, const WarpPair<Config>& pair,
                                           OnlineSoftmax<Config::kTilesM>& softmax,
                                           const Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                           uint32_t shared) {
  float factor[2 * Config::kTilesM];
  softmax.normalise(factor, [&](float (&row_sum)[2 * Config::kTilesM]) {
    if constexpr (Config::kPairs) pair.combine_rows(row_sum, [](float a, float b) { return a + b; });
  });
  complete_rows(factor, softmax, policy, queries, share.row, share.key == 0);
  store_tile<Config::kDtype, Config::kHeadDim>(
      shared, output, factor, share.row, share.dim, queries.rows, queries.params->head_dim_v,
      [&](int row) { return queries.out<typename Config::Element>(row); });
}

// The main loop: from the last block of keys to the first.
template <class Config, class Scores>
__device__ __forceinline__ void attend(const Work<Config::kMask, Config::kBlockN>& work,
                                       uint8_t* shared_memory) {
  const QueryBlock& queries = work.queries;
  const ForwardParams& params = *queries.params;
  const Scores policy{params};
  const uint32_t shared = ptx::shared_address(shared_memory);
  int block = work.blocks.end - 1;
  KeyCopies<Config> copies(queries, shared + Config::kQueryBytes, block);
  TileCopy<typename Config::Element, Config::kBlockM, Config::kHeadDim, Config::kThreads>(
      shared, queries.query<typename Config::Element>(0), params.q_row_stride)
      .issue(params.q_row_stride, queries.rows, params.head_dim);
  copies.issue_keys(block);

  const WarpShare<Config> share;
  const FragmentAddresses<Config> addresses(shared, share);
  const WarpPair<Config> pair(shared_memory + Config::kQueryBytes + 2 * Config::kKeyBytes);
  Accumulator<Config::kTilesM, Config::kTilesD> output = {};
  OnlineSoftmax<Config::kTilesM> softmax;

  for (; block >= work.blocks.begin; --block) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    copies.issue_values(block);

    Accumulator<Config::kTilesM, Config::kTilesN> scores;
    const int key = block * Config::kBlockN + share.key;
    multiply_rows<Config::kDtype, Config::kHeadDim>(scores, addresses.query, addresses.key);
    policy.modify(scores, queries, work.mask.diagonal, share.row, key);
    if (work.blocks.needs_mask(block)) {
      const int first_row = ptx::opaque(queries.first_row + share.row);
      QueryRows<Config::kTilesM, Config::kMask>(work.mask, first_row, queries.group).mask(scores, key);
    }
    update_softmax<Config>(softmax, scores, output, policy.exponent_scale(), pair, [&] {
      if (block > work.blocks.begin) copies.issue_keys(block - 1);
    });
    policy.drop(scores, queries, share.row, key);
    accumulate_block(output, scores, addresses.value, share, pair);
  }
  store_rows(queries, policy, share, pair, softmax, output, shared);
}

template <class Config, class Scores>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  using Element = typename Config::Element;
  const ForwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const Sequence sequence(params, tile.batch);
  const auto queries = [&](int first_row) {
    return QueryBlock(params, sequence, tile.batch, tile.head, 1, first_row, Config::kBlockM);
  };
  const int first_row = tile.m_block * Config::kBlockM;
  if (tile.batch == params.batch) {
    for_each_tile(int64_t{first_row}, arguments.schedule.tiles_m * Config::kBlockM, sequence.seqlen_q,
                  [&](int row) { store_empty_rows<Element>(queries(row), threadIdx.x, Config::kThreads); });
  } else if (first_row < sequence.seqlen_q) {
    const Work<Config::kMask, Config::kBlockN> work(queries(first_row));
    if (work.has_keys()) {
      attend<Config, Scores>(work, shared_memory);
    } else {
      store_empty_rows<Element>(work.queries, threadIdx.x, Config::kThreads);
    }
  }
}

}  // namespace flash_attn::mma
