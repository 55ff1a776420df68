// Compile-time description of one forward kernel of the sm80 family. The numbers come from the tile table in codegen.
#pragma once

#include "common/dtype.cuh"
#include "common/shared_tile.cuh"

namespace flash_attn::sm80 {

template <int block_m, int block_n, int warps, int stages, int min_blocks, bool query_in_registers>
struct ForwardTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarps = warps;
  static constexpr int kStages = stages;        // buffers of K and of V
  static constexpr int kMinBlocks = min_blocks;  // thread blocks per multiprocessor that registers must allow
  static constexpr bool kQueryInRegisters = query_in_registers;
};

template <Dtype dtype, int head_dim, Mask mask, class TileType>
struct ForwardConfig {
  using Tile = TileType;
  using Element = typename ElementOf<dtype>::Type;
  static constexpr Dtype kDtype = dtype;
  static constexpr int kHeadDim = head_dim;
  static constexpr Mask kMask = mask;
  static constexpr int kBlockM = Tile::kBlockM;
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kThreads = 32 * Tile::kWarps;

  // A warp owns whole rows of S and O, so that the softmax needs no exchange between warps.
  static constexpr int kWarpRows = kBlockM / Tile::kWarps;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kBlockN / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static_assert(kWarpRows % 16 == 0 && kBlockN % 16 == 0, "mma.sync works on 16x16 blocks");

  // Shared memory: Q (later O) | K stages | V stages.
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
  static constexpr int kSharedBytes = kQueryBytes + 2 * Tile::kStages * kKeyBytes;
};

}  // namespace flash_attn::sm80
