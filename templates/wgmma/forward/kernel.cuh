// Forward attention for Hopper: TMA copies, wgmma products, warp specialisation (FlashAttention-3, algorithm
// 2). Read in this order: forward_kernel at the end, Producer, Consumer::run, Consumer::attend.
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

#include <cstdint>

#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "problem/work.cuh"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "warp/accumulator.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/softmax.cuh"
#include "wgmma.cuh"
#include "wgmma/forward/config.cuh"
#include "wgmma/key_source.cuh"
#include "wgmma/pipeline.cuh"
#include "wgmma/products.cuh"

namespace flash_attn::wgmma {

// The rows of a tile, or `max_rows` of them from `row` on, and the blocks of keys that they see.
template <class Config, bool kPacked, class KeySource>
__device__ __forceinline__ auto work_of(const KeySource& source, const Sequence& sequence,
                                        const TileSchedule::Tile& tile, int row, int max_rows) {
  return Work<Config::kMask, Config::kBlockN>(QueryBlock(source.forward(), sequence, tile.batch, tile.head,
                                                         kPacked ? source.group : 1,
                                                         tile.m_block * Config::kBlockM + row, max_rows));
}

// The same of the whole tile, and of its part of the keys.
template <class Config, bool kPacked, class KeySource>
__device__ __forceinline__ auto tile_work(const KeySource& source, const Sequence& sequence,
                                          const TileSchedule::Tile& tile) {
  auto work = work_of<Config, kPacked>(source, sequence, tile, 0, Config::kBlockM);
  if (source.key_parts() > 1) work.keep(KeyPart{tile.key_part, source.key_parts()});
  return work;
}

// One thread, or two warps: one names tiles and copies Q and K, the other copies V, every lane its share of
// each block of keys. Where a block lies is looked up while the one before it is waited for.
template <class Config, bool kPacked, class KeySource>
struct Producer {
  static constexpr bool kWarps = KeySource::kProducers > 1;
  const KeySource& source;
  const SharedLayout<Config>& shared;
  bool leader;
  RingPosition<Config::kStages> k_ring, v_ring;
  RingPosition<Config::kQueryStages> q_ring;

  __device__ __forceinline__ Producer(const KeySource& source, const SharedLayout<Config>& shared)
      : source(source), shared(shared), leader(threadIdx.x % 32 == 0) {}

  __device__ __forceinline__ int key_head(const QueryBlock& queries) const {
    return queries.head * queries.group / (queries.params->num_heads / queries.params->num_heads_k);
  }

  // A lane that came late to a barrier would find it a phase too far and wait for ever: a warp meets first.
  __device__ __forceinline__ void synchronize() const {
    if (kWarps) __syncwarp();
  }

  // Hands a tile to the consumers, with Q or nothing to read; no_tile() ends their work.
  __device__ __forceinline__ void publish(const TileSchedule::Tile& tile, int bytes) const {
    ptx::mbarrier_wait(shared.q_empty(q_ring.stage), q_ring.parity ^ 1);
    synchronize();
    if (!leader) return;
    write_tile(shared.tile(q_ring.stage), tile);
    ptx::mbarrier_arrive_expect(shared.q_full(q_ring.stage), bytes);
  }

  // The buffer has been read: `bytes` will arrive in it.
  __device__ __forceinline__ void expect(uint32_t empty, uint32_t parity, uint32_t full, int bytes) const {
    ptx::mbarrier_wait(empty, parity);
    if (leader) ptx::mbarrier_arrive_expect(full, bytes);
    synchronize();
  }

  __device__ __forceinline__ void load_queries(const QueryBlock& queries) const {
    if (!leader) return;
    const Sequence& sequence = queries.sequence;
#pragma unroll
    for (int slab = 0; slab < Config::kSlabs; ++slab) {
      ptx::copy_tensor(shared.query(q_ring.stage) + slab * Config::kQuerySlabBytes, source.maps.q,
                       shared.q_full(q_ring.stage), slab * 64, 0, sequence.q_row + queries.query_of(0),
                       queries.head, sequence.q_batch);
    }
  }

  template <class Location>
  __device__ __forceinline__ void load_key(const Location& keys, int key_head) {
    const uint32_t full = shared.k_full(k_ring.stage);
    expect(shared.k_empty(k_ring.stage), k_ring.parity ^ 1, full, Config::kKeyBytes);
    source.template copy<Config, Config::kSlabs>(source.maps.k, shared.key(k_ring.stage), full, keys,
                                                 key_head);
    k_ring.advance();
  }

  template <class Location>
  __device__ __forceinline__ void load_value(const Location& keys, int key_head) {
    const uint32_t full = shared.v_full(v_ring.stage);
    expect(shared.v_empty(v_ring.stage), v_ring.parity ^ 1, full, Config::kValueBytes);
    source.template copy<Config, Config::kSlabsV>(source.maps.v, shared.value(v_ring.stage), full, keys,
                                                  key_head);
    v_ring.advance();
  }

  __device__ __forceinline__ void run() {
    const TileQueue<kWarps ? 32 : 1> queue{source.forward().tile_counter,
                                           static_cast<int>(source.num_tiles())};
    for (int index = blockIdx.x; index < queue.num_tiles; index = queue.next(index)) {
      const TileSchedule::Tile tile = source.tile(index);
      const auto sequence = source.sequence(tile.batch);
      const auto work = tile_work<Config, kPacked>(source, sequence, tile);
      if (work.queries.rows <= 0) continue;
      if (!work.has_keys()) {
        publish(tile, 0);
        q_ring.advance();
        continue;
      }
      const int head = key_head(work.queries), begin = work.blocks.begin;
      int block = work.blocks.end - 1;
      auto keys = source.template locate<Config>(sequence, block);
      auto next = source.template locate<Config>(sequence, max(block - 1, begin));
      load_key(keys, head);
      publish(tile, Config::kQueryBytes);
      load_queries(work.queries);
      q_ring.advance();
      for (; block > begin; --block) {
        const auto ahead = source.template locate<Config>(sequence, max(block - 2, begin));
        load_key(next, head);
        if (!kWarps) load_value(keys, head);
        keys = next;
        next = ahead;
      }
      if (!kWarps) load_value(keys, head);
    }
    publish(no_tile(), 0);
  }

  // The warp that copies V. It learns of tiles as the consumers do.
  __device__ __forceinline__ void run_values() {
    while (true) {
      ptx::mbarrier_wait(shared.q_full(q_ring.stage), q_ring.parity);
      const TileSchedule::Tile tile = read_tile(shared.tile(q_ring.stage));
      synchronize();
      if (leader) ptx::mbarrier_arrive(shared.q_empty(q_ring.stage));
      q_ring.advance();
      if (!is_tile(tile)) return;
      const auto sequence = source.sequence(tile.batch);
      const auto work = tile_work<Config, kPacked>(source, sequence, tile);
      if (!work.has_keys()) continue;
      const int head = key_head(work.queries), begin = work.blocks.begin;
      int block = work.blocks.end - 1;
      auto keys = source.template locate<Config>(sequence, block);
      for (; block >= begin; --block) {
        const auto next = source.template locate<Config>(sequence, max(block - 1, begin));
        load_value(keys, head);
        keys = next;
      }
    }
  }
};

// One consumer warpgroup.
template <class Config, class Scores, bool kPacked, class KeySource>
struct Consumer {
  using OwnWork = Work<Config::kMask, Config::kBlockN>;
  const KeySource& source;
  const Scores policy;
  const SharedLayout<Config>& shared;
  int warpgroup;
  bool leader;
  float scale_log2;
  RingPosition<Config::kStages> k_ring, v_ring;
  RingPosition<Config::kQueryStages> q_ring;

  __device__ __forceinline__ Consumer(const KeySource& source, const SharedLayout<Config>& shared,
                                      int warpgroup)
      : source(source),
        policy{source.forward()},
        shared(shared),
        warpgroup(warpgroup),
        leader(threadIdx.x % 128 == 0),
        scale_log2(policy.exponent_scale()) {}

  __device__ __forceinline__ void release(uint32_t barrier) const {
    if (leader) ptx::mbarrier_arrive(barrier);
  }
  __device__ __forceinline__ void synchronize() const { ptx::barrier_sync(1 + warpgroup, 128); }

  __device__ __forceinline__ void run() {
    while (true) {
      ptx::mbarrier_wait(shared.q_full(q_ring.stage), q_ring.parity);
      const TileSchedule::Tile tile = read_tile(shared.tile(q_ring.stage));
      if (!is_tile(tile)) return;
      const Sequence sequence = source.sequence(tile.batch);
      const auto all = tile_work<Config, kPacked>(source, sequence, tile);
      auto own = work_of<Config, kPacked>(source, sequence, tile, warpgroup * 64, 64);
      if (source.key_parts() > 1) own.keep(all.blocks.begin, all.blocks.end);
      if (own.has_keys()) {
        skip_blocks(all.blocks.end - own.blocks.end);
        attend(own, tile.key_part);
        skip_blocks(own.blocks.begin - all.blocks.begin);
      } else {
        synchronize();
        release(shared.q_empty(q_ring.stage));
        skip_blocks(all.blocks.end - all.blocks.begin);
        store_no_keys(own.queries, tile.key_part);
      }
      q_ring.advance();
    }
  }

  // Rows that see no key. Those past the last sequence may be more than its tiles.
  __device__ __forceinline__ void store_no_keys(QueryBlock queries, int key_part) const {
    const int64_t rows = int64_t{queries.sequence.seqlen_q} * queries.group;
    for_each_tile(int64_t{queries.first_row}, source.schedule.tiles_m * Config::kBlockM, rows, [&](int row) {
      queries.first_row = row;
      queries.rows = static_cast<int>(min(rows - row, int64_t{64}));
      source.template store_no_keys<typename Config::Element>(queries, key_part, threadIdx.x % 128, 128);
    });
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
  __device__ __forceinline__ bool update_softmax(const OwnWork& work, OnlineSoftmax<1>& softmax,
                                                 Accumulator<1, Config::kTilesN>& scores, float (&factor)[2],
                                                 int block) const {
    const int row = threadIdx.x % 128 / 32 * 16, key = block * Config::kBlockN;
    policy.modify(scores, work.queries, work.mask.diagonal, row, key);
    if (work.blocks.needs_mask(block)) {
      const int first_row = ptx::opaque(work.queries.first_row + row);
      QueryRows<1, Config::kMask>(work.mask, first_row, work.queries.group).mask(scores, key);
    }
    float block_max[2];
    softmax.block_max(block_max, scores);
    const bool lags = __any_sync(0xffffffff, softmax.lags(block_max, scale_log2));
    if (lags) softmax.advance(factor, block_max, scale_log2);
    softmax.exponentiate(scores, scale_log2);
    if constexpr (KeySource::kDropout) policy.drop(scores, work.queries, row, key);
    return lags;
  }

  __device__ __forceinline__ void attend(const OwnWork& work, int key_part) {
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
    release_keys(scores, block == work.blocks.begin);
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
      release_keys(scores, block == work.blocks.begin);
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
    source.template store<Config>(work.queries, key_part, policy, softmax, output);
  }

  // The scores have been waited for: releases K, and Q after the `last` of them.
  __device__ __forceinline__ void release_keys(Accumulator<1, Config::kTilesN>& scores, bool last) {
    ptx::settle(scores);
    release(shared.k_empty(k_ring.stage));
    k_ring.advance();
    if (last) release(shared.q_empty(q_ring.stage));
  }

  // Whether the block has rows of V past the end of a sequence; their probabilities are 0, but 0 * NaN is
  // not. Rows past the end of the tensor arrive as zeros.
  __device__ __forceinline__ bool needs_zeros(const OwnWork& work, int block) const {
    return source.has_rows_behind() && (block + 1) * Config::kBlockN > work.queries.sequence.seqlen_k;
  }

  // Each warpgroup for itself. Another one's product may be reading these rows already, but it has zeroed
  // them before, so that they only change from zero to zero.
  __device__ __forceinline__ void zero_values(const OwnWork& work, int block) const {
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

template <class Config, class Scores, bool kPacked, class KeySource>
__global__ void __launch_bounds__(Config::kThreads, 1)
    forward_kernel(const __grid_constant__ KeySource source) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const SharedLayout<Config> shared(shared_memory);
  if (threadIdx.x == 0) shared.init_barriers(Config::kConsumers + (KeySource::kProducers > 32));
  __syncthreads();
  // The shuffle tells the compiler that this is uniform in a warp.
  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    ptx::give_registers<Config::kProducerRegisters>();
    if (threadIdx.x >= KeySource::kProducers) return;
    Producer<Config, kPacked, KeySource> producer(source, shared);
    if (KeySource::kProducers == 1 || threadIdx.x < 32) {
      producer.run();
    } else {
      producer.run_values();
    }
  } else {
    ptx::take_registers<Config::kConsumerRegisters>();
    Consumer<Config, Scores, kPacked, KeySource>(source, shared, warpgroup - 1).run();
  }
}

}  // namespace flash_attn::wgmma
