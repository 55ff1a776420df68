// Compile-time description of the kernel over a KV cache. The numbers come from the tile table in codegen.
#pragma once

#include "mma/config.cuh"

namespace flash_attn::mma {

template <int block_m, int block_n, int warps_m, int warps_n, int stages, int min_blocks>
struct CacheTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarpsM = warps_m;  // warps share the rows among them
  static constexpr int kWarpsN = warps_n;  // and the keys of each block
  static constexpr int kStages = stages;   // buffers for K, and for V
  static constexpr int kMinBlocks = min_blocks;
};

template <Dtype dtype, int head_dim, Mask mask, class Tile>
struct CacheConfig : MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarpsM * Tile::kWarpsN> {
  using Base = MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarpsM * Tile::kWarpsN>;
  using Base::kBlockM, Base::kBlockN, Base::kQueryBytes, Base::kKeyBytes, Base::kThreads;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kWarpsN = Tile::kWarpsN;

  static constexpr int kWarpRows = kBlockM / Tile::kWarpsM;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpKeys / 8;
  static constexpr int kTilesD = head_dim / 8;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0, "mma.sync works on 16x16 blocks");

  // Where each warp has keys of its own, it copies them itself and waits for no other warp.
  static constexpr bool kOwnKeys = Tile::kWarpsM == 1;
  static constexpr int kCopyThreads = kOwnKeys ? 32 : kThreads;
  static constexpr int kCopyRows = kOwnKeys ? kWarpKeys : kBlockN;

  // Shared memory: Q | for each stage K, V; in the end O of every warp in fp32 | maximum and sum of its rows.
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kOutputStride = head_dim + 8;  // fp32; the 8 spread rows over the banks
  static constexpr int kOutputBytes = kWarpsN * kBlockM * (kOutputStride + 2) * 4;
  static constexpr int kRingBytes = kQueryBytes + kStages * kStageBytes;
  static constexpr int kSharedBytes = kRingBytes > kOutputBytes ? kRingBytes : kOutputBytes;
};

}  // namespace flash_attn::mma
