// Compile-time description of Hopper's forward kernel, and its shared memory. The numbers come from the tile
// table in codegen.
#pragma once

#include <cstdint>

#include "abi.h"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"

namespace flash_attn::wgmma {

template <int block_m, int block_n, int stages, int query_stages, int head_dim_v, int max_keys>
struct ForwardTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kStages = stages;             // buffers for K, and as many for V
  static constexpr int kQueryStages = query_stages;  // buffers for Q
  static constexpr int kHeadDimV = head_dim_v;       // 0: as that of Q and K
  static constexpr int kMaxKeys = max_keys;          // keys that a query sees on average, at most; 0: any
};

template <Dtype dtype, int head_dim, Mask mask, class TileType>
struct ForwardConfig {
  using Tile = TileType;
  using Element = typename ptx::ElementOf<dtype>::Type;
  static constexpr Dtype kDtype = dtype;
  static constexpr int kHeadDim = head_dim;
  static constexpr int kHeadDimV = Tile::kHeadDimV == 0 ? head_dim : Tile::kHeadDimV;
  static constexpr Mask kMask = mask;
  static constexpr int kBlockM = Tile::kBlockM;
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kQueryStages = Tile::kQueryStages;

  // A producer warpgroup, of which one thread or warp works, and consumers of 64 rows each. A multiprocessor
  // has 65536 registers, 512 for every thread of a warpgroup, to share out among them.
  static constexpr int kConsumers = kBlockM / 64;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 160;
  static_assert(kConsumers == 2 || kConsumers == 3, "registers are shared out for these");
  static_assert(kStages >= 2, "the next V is waited for before this one is released");

  // What a warp computes.
  static constexpr int kTilesN = kBlockN / 8;
  static constexpr int kTilesD = kHeadDimV / 8;

  // Shared memory: Q stages | K stages | V stages | barriers. Tiles are stored in slabs of 64 columns.
  static constexpr int kSlabs = (kHeadDim + 63) / 64;
  static constexpr int kSlabsV = (kHeadDimV + 63) / 64;
  static constexpr int kQuerySlabBytes = kBlockM * 128;
  static constexpr int kKeySlabBytes = kBlockN * 128;  // of V, too
  static constexpr int kQueryBytes = kSlabs * kQuerySlabBytes;
  static constexpr int kKeyBytes = kSlabs * kKeySlabBytes;
  static constexpr int kValueBytes = kSlabsV * kKeySlabBytes;
  static constexpr int kBarrierBytes = 256;
  static_assert(32 * (kStages + kQueryStages) <= kBarrierBytes, "barriers must fit");
  static_assert(kTilesD % 4 == 0, "the epilogue transposes four tiles at a time");
  static constexpr int kSharedBytes =
      kQueryStages * kQueryBytes + kStages * (kKeyBytes + kValueBytes) + kBarrierBytes;
};

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

  // `tile_readers` are told of each tile.
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

}  // namespace flash_attn::wgmma
