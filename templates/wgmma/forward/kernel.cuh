// Forward attention for Hopper: TMA copies, wgmma products, warp specialisation (FlashAttention-3, algorithm
// 2).
//
// One thread block per multiprocessor works through tiles of kBlockM queries of one head. A producer (a
// thread, or two warps) copies Q, K and V into shared memory; each consumer warpgroup computes 64 rows of O.
// Inside a warpgroup the softmax of a block of keys runs during the product P V of the block before.
//
//   barrier    arrivals             says
//   q_full     producer + bytes     the next tile is named and its Q has arrived (as often as Q has buffers)
//   q_empty    1 per warpgroup      every product with Q is done (1 more where another warp copies V)
//   k_full     producer + bytes     a block of K has arrived (one barrier per stage, as for the next three)
//   k_empty    1 per warpgroup      every product with it is done
//   v_full, v_empty                 the same for V
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "host/device.h"
#include "host/launch.h"
#include "problem/key_part.cuh"
#include "problem/query_block.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/warpgroup.cuh"
#include "warp/accumulator.cuh"
#include "warp/dropout.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/config.cuh"
#include "wgmma/forward/producer.cuh"
#include "wgmma/forward/tensor_keys.cuh"
#include "wgmma/pipeline.cuh"
#include "wgmma/products.cuh"
#include "wgmma/tensors.cuh"
#include "wgmma/work.cuh"

namespace flash_attn::wgmma {

// One consumer warpgroup.
template <class Config, Variant kVariant, class Arguments>
struct Consumer {
  static constexpr bool kModifiers = kVariant == Variant::kModified;
  const Arguments& arguments;
  const ForwardParams& params;
  const SharedLayout<Config>& shared;
  int warpgroup;
  bool leader;
  float scale_log2;
  RingPosition<Config::kStages> k_ring, v_ring;
  RingPosition<Config::kQueryStages> q_ring;

  __device__ __forceinline__ Consumer(const Arguments& arguments, const SharedLayout<Config>& shared,
                                      int warpgroup)
      : arguments(arguments),
        params(arguments.forward()),
        shared(shared),
        warpgroup(warpgroup),
        leader(threadIdx.x % 128 == 0),
        scale_log2(kModifiers ? 1.0f : params.softmax_scale * kLog2E) {}

  __device__ __forceinline__ void release(uint32_t barrier) const {
    if (leader) ptx::mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void synchronize() const { ptx::barrier_sync(1 + warpgroup, 128); }

  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(shared.q_full(q_ring.stage), q_ring.parity);
      const TileSchedule::Tile tile = read_tile(shared.tile(q_ring.stage));
      if (tile.batch < 0) return;
      const Sequence sequence = arguments.sequence(tile.batch);
      const int first_row = tile.m_block * Config::kBlockM;
      const int group = packed_group<kVariant>(arguments);
      Work<Config> all(params, sequence, tile, group, first_row, Config::kBlockM);
      Work<Config> mine(params, sequence, tile, group, first_row + warpgroup * 64, 64);
      if (arguments.num_splits() > 1) {
        all.keep_part(tile.split, arguments.num_splits());
        mine.keep(all.blocks.begin, all.blocks.end);
      }
      if (mine.has_keys()) {
        skip_blocks(all.blocks.end - mine.blocks.end);
        attend(mine, tile.split);
        skip_blocks(mine.blocks.begin - all.blocks.begin);
      } else {
        synchronize();
        release(shared.q_empty(q_ring.stage));
        skip_blocks(all.blocks.end - all.blocks.begin);
        store_empty_rows({mine.queries, tile.split, arguments.num_splits()});
      }
      q_ring.advance();
    }
  }

  // Rows that see no key. Those past the last varlen sequence may be more than the tiles of the longest one.
  __device__ __forceinline__ void store_empty_rows(SplitWork work) const {
    QueryBlock& queries = work.queries;
    const int64_t step = arguments.schedule.tiles_m * Config::kBlockM;
    const int64_t rows = int64_t{queries.sequence.seqlen_q} * queries.group;
    for (int64_t row = queries.first_row; row < rows; row += step) {
      queries.first_row = static_cast<int>(row);
      queries.rows = static_cast<int>(min(rows - row, int64_t{64}));
      arguments.template store_no_keys<typename Config::Element>(work, threadIdx.x % 128);
    }
  }

  // Blocks of keys that other warpgroups' queries see and this one's do not. Its warps meet before they are
  // released: one that came late would find the barriers a phase too far and wait for ever. (Products make
  // the warps of a warpgroup meet by themselves: CUTLASS and FlashAttention-3 rely on it, too.)
  __device__ __forceinline__ void skip_blocks(int count) {
    for (; count > 0; --count) {
      ptx::mbarrier_wait(shared.k_full(k_ring.stage), k_ring.parity);
      ptx::mbarrier_wait(shared.v_full(v_ring.stage), v_ring.parity);
      synchronize();
      release(shared.k_empty(k_ring.stage));
      release(shared.v_empty(v_ring.stage));
      k_ring.advance();
      v_ring.advance();
    }
  }

  // Scores of a block become probabilities; true if O must be multiplied by `factor`.
  __device__ __forceinline__ bool update_softmax(const Work<Config>& work, OnlineSoftmax<1>& softmax,
                                                 Accumulator<1, Config::kTilesN>& scores, float (&factor)[2],
                                                 int block) const {
    const int row = work.queries.first_row + threadIdx.x % 128 / 32 * 16, key = block * Config::kBlockN;
    if constexpr (kModifiers) {
      apply_modifiers(scores, ScoreModifiers(params, work.queries.batch, work.queries.head),
                      work.mask.diagonal, row, key);
    }
    if (work.blocks.needs_mask(block)) {
      if constexpr (kVariant == Variant::kPacked) {
        AttentionMask<Config::kMask> by_query = work.mask;
        by_query.group = 1;
        RowBounds<1>(by_query, row, work.mask.group).apply(scores, key);
      } else {
        apply_mask(scores, work.mask, row, key);
      }
    }
    float block_max[2];
    softmax.block_max(block_max, scores);
    const bool lags = __any_sync(0xffffffff, softmax.lags(block_max, scale_log2));
    if (lags) softmax.advance(factor, block_max, scale_log2);
    softmax.exponentiate(scores, scale_log2);
    if constexpr (kModifiers) {
      if (params.dropout_p > 0.0f) {
        apply_dropout(scores, Dropout(params, work.queries.batch * params.num_heads + work.queries.head), row,
                      key);
      }
    }
    return lags;
  }

  __device__ __forceinline__ void attend(const Work<Config>& work, int split) {
    Accumulator<1, Config::kTilesN> scores;
    Accumulator<1, Config::kTilesD> output = {};
    RoundedProbs<1, Config::kTilesN> probs;
    OnlineSoftmax<1> softmax;
    float factor[2];
    const uint32_t query = shared.query(q_ring.stage) + warpgroup * 64 * 128;

    int block = work.blocks.end - 1;
    ptx::mbarrier_wait(shared.k_full(k_ring.stage), k_ring.parity);
    issue_scores<Config>(scores, query, shared.key(k_ring.stage));
    ptx::wgmma_wait<0>();
    finish_scores(scores, block == work.blocks.begin);
    update_softmax(work, softmax, scores, factor, block);
    ptx::mbarrier_wait(shared.v_full(v_ring.stage), v_ring.parity);
    if (needs_zeros(work, block)) zero_values(work, block);
    round_probs<Config::kDtype>(probs, scores);

    while (block > work.blocks.begin) {
      --block;
      ptx::mbarrier_wait(shared.k_full(k_ring.stage), k_ring.parity);
      issue_scores<Config>(scores, query, shared.key(k_ring.stage));
      issue_output<Config>(output, probs, shared.value(v_ring.stage));
      ptx::wgmma_wait<1>();
      finish_scores(scores, block == work.blocks.begin);
      const bool lags = update_softmax(work, softmax, scores, factor, block);
      // The next V is waited for here, before the product with this one: ptxas moves no exponential across
      // the loop in this wait, but it would move them all behind the wait for the product.
      ptx::settle(scores);
      const uint32_t v_empty = shared.v_empty(v_ring.stage);
      v_ring.advance();
      ptx::mbarrier_wait(shared.v_full(v_ring.stage), v_ring.parity);
      ptx::wgmma_wait<0>();
      ptx::settle(output);
      release(v_empty);
      if (lags) softmax.rescale(output, factor);
      round_probs<Config::kDtype>(probs, scores);
    }

    issue_output<Config>(output, probs, shared.value(v_ring.stage));
    ptx::wgmma_wait<0>();
    ptx::settle(output);
    release(shared.v_empty(v_ring.stage));
    v_ring.advance();
    arguments.template finish<Config, kModifiers>({work.queries, split, arguments.num_splits()}, softmax,
                                                  output, scale_log2);
  }

  // The scores have been waited for: releases K, and Q after the `last` of them.
  __device__ __forceinline__ void finish_scores(Accumulator<1, Config::kTilesN>& scores, bool last) {
    ptx::settle(scores);
    release(shared.k_empty(k_ring.stage));
    k_ring.advance();
    if (last) release(shared.q_empty(q_ring.stage));
  }

  // Whether the block has rows of V past the end of a sequence; their probabilities are 0, but 0 * NaN is
  // not. Rows past the end of the tensor arrive as zeros.
  __device__ __forceinline__ bool needs_zeros(const Work<Config>& work, int block) const {
    return arguments.has_rows_behind() && (block + 1) * Config::kBlockN > work.queries.sequence.seqlen_k;
  }

  // Each warpgroup for itself. Another one's product may be reading these rows already, but it has zeroed
  // them before, so that they only change from zero to zero.
  __device__ __forceinline__ void zero_values(const Work<Config>& work, int block) const {
    const int first = work.queries.sequence.seqlen_k - block * Config::kBlockN;
    const uint32_t chunk = shared.value(v_ring.stage) + threadIdx.x % 8 * 16;
    for (int row = first + threadIdx.x % 128 / 8; row < Config::kBlockN; row += 16) {
#pragma unroll
      for (int slab = 0; slab < Config::kSlabsV; ++slab) {
        ptx::store_shared_16(chunk + slab * Config::kKeySlabBytes + row * 128, make_uint4(0, 0, 0, 0));
      }
    }
    ptx::fence_async_proxy();
    synchronize();
  }
};

template <class Config, Variant kVariant, class Arguments>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedLayout<Config> shared(shared_memory);
  if (threadIdx.x == 0) shared.init_barriers(Config::kConsumers + (Arguments::kProducers > 32));
  __syncthreads();
  // The warpgroup's number as the compiler can tell that it is the same for a whole warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x >= Arguments::kProducers) return;
    Producer<Config, kVariant, Arguments> producer(arguments, shared);
    if (Arguments::kProducers == 1 || threadIdx.x < 32) {
      producer.run();
    } else {
      producer.run_values();
    }
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    Consumer<Config, kVariant, Arguments>(arguments, shared, warpgroup - 1).run();
  }
}

}  // namespace flash_attn::wgmma
