// Compile-time description of one kernel with split keys. The numbers come from the tile table in codegen.
#pragma once

#include "ptx/dtype.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

template <int block_m, int block_n, int warps_m, int warps_n, int stages, int min_blocks>
struct SplitTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarpsM = warps_m;  // warps share the rows among them
  static constexpr int kWarpsN = warps_n;  // and the keys of each block
  static constexpr int kStages = stages;   // buffers for K, and for V
  static constexpr int kMinBlocks = min_blocks;
};

// With `modifiers`: softcap and ALiBi. A kernel without has a seventh less code, which few queries notice.
// With `aligned`: rows of the cache can be copied 16 bytes at a time.
template <Dtype dtype, int head_dim, Mask mask, class TileType, bool modifiers = false, bool aligned = true>
struct SplitConfig {
  using Tile = TileType;
  using Element = typename ElementOf<dtype>::Type;
  static constexpr Dtype kDtype = dtype;
  static constexpr int kHeadDim = head_dim;
  static constexpr Mask kMask = mask;
  static constexpr bool kModifiers = modifiers;
  static constexpr bool kAligned = aligned;
  static constexpr int kBlockM = Tile::kBlockM;
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kStages = Tile::kStages;
  static constexpr int kWarpsN = Tile::kWarpsN;
  static constexpr int kThreads = 32 * Tile::kWarpsM * kWarpsN;

  static constexpr int kWarpRows = kBlockM / Tile::kWarpsM;
  static constexpr int kWarpKeys = kBlockN / kWarpsN;
  static constexpr int kTilesM = kWarpRows / 16;
  static constexpr int kTilesN = kWarpKeys / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static_assert(kWarpRows % 16 == 0 && kWarpKeys % 16 == 0, "mma.sync works on 16x16 blocks");

  // Where each warp has keys of its own, it copies them itself and waits for no other warp.
  static constexpr bool kOwnKeys = Tile::kWarpsM == 1;
  static constexpr int kCopyThreads = kOwnKeys ? 32 : kThreads;
  static constexpr int kCopyRows = kOwnKeys ? kWarpKeys : kBlockN;

  // Shared memory: Q | for each stage K, V; in the end O of every warp in fp32 | maximum and sum of its rows.
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
  static constexpr int kOutputStride = kHeadDim + 8;  // fp32; the 8 spread rows over the banks
  static constexpr int kOutputBytes = kWarpsN * kBlockM * (kOutputStride + 2) * 4;
  static constexpr int kRingBytes = kQueryBytes + 2 * kStages * kKeyBytes;
  static constexpr int kSharedBytes = kRingBytes > kOutputBytes ? kRingBytes : kOutputBytes;
};

template <class Config>
struct ModifiedSplit
    : SplitConfig<Config::kDtype, Config::kHeadDim, Config::kMask, typename Config::Tile, true> {};

// One kernel for all calls over a cache of odd head dims, strides or addresses: with modifiers or not.
template <class Config>
struct UnalignedSplit
    : SplitConfig<Config::kDtype, Config::kHeadDim, Config::kMask, typename Config::Tile, true, false> {};

}  // namespace flash_attn::mma
