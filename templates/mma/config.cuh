// What every kernel of the mma design knows at compile time: mma.sync m16n8k16 and cp.async, sm_80 and later.
#pragma once

#include "abi.h"
#include "ptx/arithmetic.cuh"

namespace flash_attn::mma {

template <Dtype dtype, int head_dim, Mask mask, class TileType, int warps>
struct MmaConfig {
  using Tile = TileType;
  using Element = typename ptx::ElementOf<dtype>::Type;
  static constexpr Dtype kDtype = dtype;
  static constexpr int kHeadDim = head_dim;
  static constexpr Mask kMask = mask;
  static constexpr int kBlockM = Tile::kBlockM;
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kThreads = 32 * warps;

  // Shared memory of a tile of Q or O, and of one of K or V.
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
};

}  // namespace flash_attn::mma
