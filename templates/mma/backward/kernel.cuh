// Backward attention for GPUs with mma.sync m16n8k16 and cp.async (Ampere and later); FlashAttention-2,
// algorithm 2.
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

#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/backward/config.cuh"
#include "mma/backward/convert.cuh"
#include "mma/backward/prepare.cuh"
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
__device__ __forceinline__ void run_steps(KeyGradient<Config>& gradient, const KeyBlock<Config>& keys,
                                          const BackwardPart<Config>& part) {
  constexpr bool kDelayed = Config::Tile::kScoreStages == 2;
  const auto add_previous = [&](QueryStep step, int stage) {
    if (!kDelayed || keys.is_first(step)) return;
    add_query_gradient(keys, keys.previous(step), part.shared, 1 - stage);
  };
  QueryStep step = keys.first();
  int stage = 0;
  for (int left = keys.steps(); left > 0; --left) {
    ptx::cp_async_wait<0>();
    ptx::barrier_sync(0, Config::kThreads);
    if (left > 1) load_step(keys, keys.next(step), part.shared, 1 - stage);
    if constexpr (kValueWarp) {
      add_value_gradient(gradient, keys, part, step, stage, kDelayed ? stage : 0);
      add_previous(step, stage);
    } else {
      add_previous(step, stage);
      add_key_gradient(gradient, keys, part, stage, kDelayed ? stage : 0);
    }
    if constexpr (!kDelayed) {
      ptx::barrier_sync(0, Config::kThreads);
      add_query_gradient(keys, step, part.shared, 0);
    }
    step = keys.next(step);
    stage = 1 - stage;
  }
  ptx::cp_async_wait<0>();
  ptx::barrier_sync(0, Config::kThreads);
  add_previous(step, stage);
}

template <class Config>
__device__ __forceinline__ void differentiate(const KeyBlock<Config>& keys, uint8_t* shared_memory) {
  const BackwardPart<Config> part(shared_memory);
  load_keys(keys, part.shared);
  if (keys.steps() > 0) load_step(keys, keys.first(), part.shared, 0);
  KeyGradient<Config> gradient = {};
  const bool value_warp = threadIdx.x / 32 < Config::kPairs;
  if (value_warp) {
    run_steps<Config, true>(gradient, keys, part);
  } else {
    run_steps<Config, false>(gradient, keys, part);
  }
  if (keys.params.dk == nullptr) return;
  if (keys.params.key_parts > 1) return store_partial_gradient(gradient, keys, value_warp);
  ptx::barrier_sync(0, Config::kThreads);
  store_key_gradient(gradient, keys, part, value_warp);
}

template <class Config>
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
  // Keys past the longest sequence that the call names have no thread block: nobody must wait for it.
  sequence.seqlen_k = min(sequence.seqlen_k, params.forward.seqlen_k);
  if (block * Config::kBlockN >= sequence.seqlen_k) return;
  differentiate(KeyBlock<Config>(params, sequence, tile.batch, tile.head, block), shared_memory);
}

}  // namespace flash_attn::mma
