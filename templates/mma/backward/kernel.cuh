// Backward attention by mma.sync and cp.async; FlashAttention-2, algorithm 2. Read from backward_kernel at
// the end upwards: kernel, loop over steps; their products are in steps.cuh, the tile and its copies in
// tile.cuh.
//
// One thread block computes kBlockN rows of dK and dV for one head of K and V. It keeps K and V in shared
// memory and steps through blocks of queries, of all heads that share these keys, or of one part of them.
// Scores are transposed, S^T = K Q^T, so that P^T and dS^T leave the tensor cores as operands of the next
// products.
//
// Warps work in pairs that share kWarpKeys keys, because one warp has no room for 32 rows of both dV and dK:
//
//   value warp   S^T = K Q^T, P^T = exp(S^T - LSE), hands P^T over                      dV += P^T dO
//   key warp     dP^T = V dO^T                       dS^T = P^T (dP^T - D), stores dS^T  dK += dS^T Q
//
// and all warps together dQ += dS K, added up in global memory. With two stages for the scores dQ of a step
// is computed during the next one, by value warps last and by key warps first: so that key warps need P when
// it is ready, and the tensor cores work while value warps exponentiate. One barrier a step:
//
//   barrier            what has arrived               what every warp is done with
//   step               Q, dO, LSE, D; dS of the last   Q, dO of the last; dS of the one before
//   pair and chunk     P, from value to key warp
//   second of a step   dS of this step                 Q, dO of this step    (with one score stage)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mma/backward/config.cuh"
#include "mma/backward/steps.cuh"
#include "mma/backward/store.cuh"
#include "mma/backward/tile.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

// The steps of a value warp and of a key warp: the same order of barriers.
template <class Config, bool kValueWarp>
__device__ __forceinline__ void run_steps(KeyGradient<Config>& gradient, const KeyTile<Config>& keys,
                                          const PairShare<Config>& share) {
  constexpr bool kDelayed = Config::Tile::kScoreStages == 2;
  const auto add_previous = [&](QueryStep step, int stage) {
    if (!kDelayed || keys.is_first(step)) return;
    add_query_gradient(keys, keys.previous(step), share.shared, 1 - stage);
  };
  QueryStep step = keys.first();
  int stage = 0;
  for (int left = keys.steps(); left > 0; --left) {
    ptx::cp_async_wait<0>();
    ptx::barrier_sync(0, Config::kThreads);
    if (left > 1) load_step(keys, keys.next(step), share.shared, 1 - stage);
    if constexpr (kValueWarp) {
      add_value_gradient(gradient, keys, share, step, stage, kDelayed ? stage : 0);
      add_previous(step, stage);
    } else {
      add_previous(step, stage);
      add_key_gradient(gradient, keys, share, stage, kDelayed ? stage : 0);
    }
    if constexpr (!kDelayed) {
      ptx::barrier_sync(0, Config::kThreads);
      add_query_gradient(keys, step, share.shared, 0);
    }
    step = keys.next(step);
    stage = 1 - stage;
  }
  ptx::cp_async_wait<0>();
  ptx::barrier_sync(0, Config::kThreads);
  add_previous(step, stage);
}

template <class Config>
__device__ __forceinline__ void differentiate(const KeyTile<Config>& keys, uint8_t* shared_memory) {
  const PairShare<Config> share(shared_memory);
  load_keys(keys, share.shared);
  if (keys.steps() > 0) load_step(keys, keys.first(), share.shared, 0);
  KeyGradient<Config> gradient = {};
  const bool value_warp = threadIdx.x / 32 < Config::kPairs;
  if (value_warp) {
    run_steps<Config, true>(gradient, keys, share);
  } else {
    run_steps<Config, false>(gradient, keys, share);
  }
  if (keys.params.dk == nullptr) return;
  if (keys.params.key_parts > 1) return store_partial_gradient(gradient, keys, value_warp);
  ptx::barrier_sync(0, Config::kThreads);
  store_key_gradient(gradient, keys, share, value_warp);
}

template <class Config, class Scores>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const BackwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const int block = params.semaphores != nullptr
                        ? tile.m_block
                        : static_cast<int>(arguments.schedule.tiles_m) - 1 - tile.m_block;
  if (tile.batch == params.forward.batch) {
    if (tile.head % params.key_parts != 0) return;
    return zero_keys<Config>(params, tile.head / params.key_parts, block, arguments.schedule.tiles_m);
  }
  Sequence sequence(params.forward, tile.batch);
  // No thread block computes keys past max_seqlen_k, so no turn may be waited for there.
  sequence.seqlen_k = min(sequence.seqlen_k, params.forward.seqlen_k);
  if (block * Config::kBlockN >= sequence.seqlen_k) return;
  differentiate(KeyTile<ScoredConfig<Config, Scores>>(params, sequence, tile.batch, tile.head, block),
                shared_memory);
}

}  // namespace flash_attn::mma
