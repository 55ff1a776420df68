// What the producer and the consumers share: buffers, barriers and the positions in them.
#pragma once

#include <cstdint>

#include "problem/schedule.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/shared_memory.cuh"
#include "wgmma/forward/config.cuh"

namespace flash_attn::wgmma {

// Addresses in shared memory.
template <class Config>
struct SharedLayout {
  uint32_t base;

  __device__ __forceinline__ explicit SharedLayout(const uint8_t* shared_memory)
      : base(ptx::shared_address(shared_memory)) {}

  __device__ __forceinline__ uint32_t query(int stage) const { return base + stage * Config::kQueryBytes; }
  __device__ __forceinline__ uint32_t key(int stage) const {
    return query(Config::kQueryStages) + stage * Config::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t value(int stage) const {
    return key(Config::kStages) + stage * Config::kValueBytes;
  }
  __device__ __forceinline__ uint32_t q_full(int stage) const { return value(Config::kStages) + 32 * stage; }
  __device__ __forceinline__ uint32_t q_empty(int stage) const { return q_full(stage) + 8; }
  __device__ __forceinline__ uint32_t tile(int stage) const { return q_full(stage) + 16; }
  __device__ __forceinline__ uint32_t k_full(int stage) const {
    return q_full(Config::kQueryStages) + 32 * stage;
  }
  __device__ __forceinline__ uint32_t k_empty(int stage) const { return k_full(stage) + 8; }
  __device__ __forceinline__ uint32_t v_full(int stage) const { return k_full(stage) + 16; }
  __device__ __forceinline__ uint32_t v_empty(int stage) const { return k_full(stage) + 24; }

  // `tile_readers` wait for a tile's name.
  __device__ __forceinline__ void init_barriers(int tile_readers) const {
    for (int stage = 0; stage < Config::kQueryStages; ++stage) {
      ptx::mbarrier_init(q_full(stage), 1);
      ptx::mbarrier_init(q_empty(stage), tile_readers);
    }
    for (int stage = 0; stage < Config::kStages; ++stage) {
      ptx::mbarrier_init(k_full(stage), 1);
      ptx::mbarrier_init(k_empty(stage), Config::kConsumers);
      ptx::mbarrier_init(v_full(stage), 1);
      ptx::mbarrier_init(v_empty(stage), Config::kConsumers);
    }
    ptx::mbarrier_init_fence();
  }
};

__device__ __forceinline__ TileSchedule::Tile read_tile(uint32_t shared) {
  const uint4 fields = ptx::load_shared_16(shared);
  return {int(fields.x), int(fields.y), int(fields.z), int(fields.w)};
}

// Position in a ring of buffers: the stage, and the parity of its full barrier's phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flash_attn::wgmma
