// Compile-time description of the forward kernel. The numbers come from the tile table in codegen.
#pragma once

#include "mma/config.cuh"

namespace flash_attn::mma {

template <int block_m, int block_n, int warps, int min_blocks, int warps_per_row>
struct ForwardTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarps = warps;
  static constexpr int kWarpsPerRow = warps_per_row;  // 2: pairs of warps share rows, see warp_pair.cuh
  static constexpr int kMinBlocks = min_blocks;  // thread blocks per multiprocessor that registers must allow
};

template <Dtype dtype, int head_dim, Mask mask, class Tile>
struct ForwardConfig : MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarps> {
  using Base = MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarps>;
  using Base::kBlockM, Base::kBlockN, Base::kQueryBytes, Base::kKeyBytes;

  // What a warp computes: kWarpRows rows of S and O, and all of their columns unless warps work in pairs.
  static constexpr bool kPairs = Tile::kWarpsPerRow == 2;
  static constexpr int kWarpRows = kBlockM * Tile::kWarpsPerRow / Tile::kWarps;
  static constexpr int kWarpKeys = kBlockN / Tile::kWarpsPerRow;
  static constexpr int kWarpDims = head_dim / Tile::kWarpsPerRow;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpKeys / 8;
  static constexpr int kTilesD = kWarpDims / 8;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0, "mma.sync works on 16x16 blocks");
  static_assert(!kPairs || kWarpDims % 64 == 0, "each warp of a pair starts at a whole slab of V");

  // Shared memory: Q (later O) | K | V | with pairs of warps: probabilities | a value per row and warp.
  static constexpr int kProbsBytes = kPairs ? kBlockM * kBlockN * 2 : 0;
  static constexpr int kRowBytes = kPairs ? kBlockM * 2 * 4 : 0;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kKeyBytes + kProbsBytes + kRowBytes;
};

}  // namespace flash_attn::mma
