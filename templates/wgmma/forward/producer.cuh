// The producer: names tiles to the consumers and copies Q, K and V into shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/kv_cache.cuh"
#include "problem/schedule.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "wgmma/pipeline.cuh"
#include "wgmma/tensors.cuh"
#include "wgmma/work.cuh"

namespace flash_attn::wgmma {

// One thread, or two warps: one names tiles and copies Q and K, the other copies V, every lane its part of
// each block of keys. Where a block lies is looked up while the one before it is waited for.
template <class Config, Variant kVariant, class Arguments>
struct Producer {
  static constexpr bool kWarps = Arguments::kProducers > 1;
  const Arguments& arguments;
  const ForwardParams& params;
  const SharedLayout<Config>& shared;
  bool leader;
  RingPosition<Config::kStages> k_ring, v_ring;
  RingPosition<Config::kQueryStages> q_ring;

  __device__ __forceinline__ Producer(const Arguments& arguments, const SharedLayout<Config>& shared)
      : arguments(arguments), params(arguments.forward()), shared(shared), leader(threadIdx.x % 32 == 0) {}

  __device__ __forceinline__ Work<Config> work_of(const TileSchedule::Tile& tile,
                                                  const Sequence& sequence) const {
    Work<Config> work(params, sequence, tile, packed_group<kVariant>(arguments),
                      tile.m_block * Config::kBlockM, Config::kBlockM);
    if (arguments.num_splits() > 1) work.keep_part(tile.split, arguments.num_splits());
    return work;
  }

  __device__ __forceinline__ int key_head(const Work<Config>& work) const {
    return work.queries.head * work.queries.group / (params.num_heads / params.num_heads_k);
  }

  // A lane that came late to a barrier would find it a phase too far and wait for ever: a warp meets first.
  __device__ __forceinline__ void meet() const {
    if (kWarps) __syncwarp();
  }

  // Hands a tile to the consumers, with Q or nothing to read; batch -1 ends their work.
  __device__ __forceinline__ void publish(const TileSchedule::Tile& tile, int bytes) const {
    ptx::mbarrier_wait(shared.q_empty(q_ring.stage), q_ring.parity ^ 1);
    meet();
    if (!leader) return;
    ptx::store_shared_16(shared.tile(q_ring.stage),
                         make_uint4(tile.m_block, tile.batch, tile.head, tile.split));
    ptx::mbarrier_arrive_expect(shared.q_full(q_ring.stage), bytes);
  }

  // The buffer has been read: `bytes` will arrive in it.
  __device__ __forceinline__ void expect(uint32_t empty, uint32_t parity, uint32_t full, int bytes) const {
    ptx::mbarrier_wait(empty, parity);
    if (leader) ptx::mbarrier_arrive_expect(full, bytes);
    meet();
  }

  __device__ __forceinline__ void load_key(const KeyLocation& at, int key_head) {
    const uint32_t full = shared.k_full(k_ring.stage);
    expect(shared.k_empty(k_ring.stage), k_ring.parity ^ 1, full, Config::kKeyBytes);
    arguments.template copy<Config, Config::kSlabs>(arguments.maps.k, shared.key(k_ring.stage), full, at,
                                                    key_head);
    k_ring.advance();
  }

  __device__ __forceinline__ void load_value(const KeyLocation& at, int key_head) {
    const uint32_t full = shared.v_full(v_ring.stage);
    expect(shared.v_empty(v_ring.stage), v_ring.parity ^ 1, full, Config::kValueBytes);
    arguments.template copy<Config, Config::kSlabsV>(arguments.maps.v, shared.value(v_ring.stage), full, at,
                                                     key_head);
    v_ring.advance();
  }

  __device__ __forceinline__ void run() {
    const TileQueue<kWarps ? 32 : 1> queue{params.tile_counter, static_cast<int>(arguments.num_tiles())};
    for (int index = blockIdx.x; index < queue.num_tiles; index = queue.next(index)) {
      const TileSchedule::Tile tile = arguments.tile(index);
      const auto sequence = arguments.sequence(tile.batch);
      const Work<Config> work = work_of(tile, sequence);
      if (work.queries.rows <= 0) continue;
      if (!work.has_keys()) {
        publish(tile, 0);
        q_ring.advance();
        continue;
      }
      const int head = key_head(work), begin = work.blocks.begin;
      int block = work.blocks.end - 1;
      KeyLocation at = arguments.template locate<Config>(sequence, block);
      KeyLocation next = arguments.template locate<Config>(sequence, max(block - 1, begin));
      load_key(at, head);
      publish(tile, Config::kQueryBytes);
      if (leader) {
        copy_queries<Config>(shared.query(q_ring.stage), arguments.maps.q, shared.q_full(q_ring.stage),
                             work.queries);
      }
      q_ring.advance();
      for (; block > begin; --block) {
        const KeyLocation ahead = arguments.template locate<Config>(sequence, max(block - 2, begin));
        load_key(next, head);
        if (!kWarps) load_value(at, head);
        at = next;
        next = ahead;
      }
      if (!kWarps) load_value(at, head);
    }
    publish({0, -1, 0}, 0);
  }

  // The warp that copies V. It learns of tiles as the consumers do.
  __device__ __forceinline__ void run_values() {
    while (true) {
      ptx::mbarrier_wait(shared.q_full(q_ring.stage), q_ring.parity);
      const TileSchedule::Tile tile = read_tile(shared.tile(q_ring.stage));
      meet();
      if (leader) ptx::mbarrier_arrive(shared.q_empty(q_ring.stage));
      q_ring.advance();
      if (tile.batch < 0) return;
      const auto sequence = arguments.sequence(tile.batch);
      const Work<Config> work = work_of(tile, sequence);
      if (!work.has_keys()) continue;
      const int head = key_head(work), begin = work.blocks.begin;
      int block = work.blocks.end - 1;
      KeyLocation at = arguments.template locate<Config>(sequence, block);
      for (; block >= begin; --block) {
        const KeyLocation next = arguments.template locate<Config>(sequence, max(block - 1, begin));
        load_value(at, head);
        at = next;
      }
    }
  }
};

}  // namespace flash_attn::wgmma
