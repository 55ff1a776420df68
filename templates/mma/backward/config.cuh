// Compile-time description of one backward kernel of the sm80 family. The numbers come from the tile table in
// codegen.
#pragma once

#include "mma/backward/workspace.cuh"
#include "ptx/dtype.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

template <int block_m, int block_n, int warps, int min_blocks, int score_stages>
struct BackwardTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarps = warps;
  static constexpr int kMinBlocks = min_blocks;  // thread blocks per multiprocessor that registers must allow
  static constexpr int kScoreStages = score_stages;  // 2: dQ of a step is computed during the next one
};

// How many of `warps` split the rows of dQ; the others split its columns, in multiples of 16. Most rows per
// warp, up to 32, mean least traffic in shared memory.
constexpr int warps_along_queries(int block_m, int head_dim, int warps) {
  int along_m = block_m > 32 ? block_m / 32 : 1;
  while (head_dim / 16 % (warps / along_m) != 0) along_m *= 2;
  return along_m;
}

// With `modifiers` (softcap, ALiBi, dropout) the scores of a chunk need twice the registers.
template <Dtype dtype, int head_dim, Mask mask, class TileType, bool modifiers = false>
struct BackwardConfig {
  using Tile = TileType;
  using Element = typename ElementOf<dtype>::Type;
  static constexpr Dtype kDtype = dtype;
  static constexpr int kHeadDim = head_dim;
  static constexpr Mask kMask = mask;
  static constexpr bool kModifiers = modifiers;
  static constexpr int kBlockM = Tile::kBlockM;
  static constexpr int kBlockN = Tile::kBlockN;
  static constexpr int kThreads = 32 * Tile::kWarps;
  static_assert(kWorkspaceRows % kBlockM == 0 && kWorkspaceRows % kBlockN == 0,
                "a sequence's rows in the workspace are whole tiles");
  static_assert(Tile::kWarps <= kBlockM, "a tile has as many semaphores as rows, and uses one per warp");

  // A pair of warps shares kWarpKeys keys, for kChunk queries at a time: one warp has dV, the other dK.
  static constexpr int kPairs = Tile::kWarps / 2;
  static constexpr int kWarpKeys = kBlockN / kPairs;
  static constexpr int kMaxChunk = (modifiers ? 1024 : 2048) / kWarpKeys;
  static constexpr int kChunk = kBlockM < kMaxChunk ? kBlockM : kMaxChunk;
  static constexpr int kChunks = kBlockM / kChunk;
  static constexpr int kTilesKeys = kWarpKeys / 16;
  static constexpr int kTilesQueries = kChunk / 8;
  static constexpr int kTilesD = kHeadDim / 8;
  static_assert(kWarpKeys % 16 == 0 && kChunk % 16 == 0 && kBlockM % kChunk == 0,
                "mma.sync works on 16x16 blocks");
  static_assert(1 + kPairs * kChunks <= 16, "there are 16 barriers");

  // A warp's part of dQ.
  static constexpr int kQueryWarps = warps_along_queries(kBlockM, kHeadDim, Tile::kWarps);
  static constexpr int kGradientTilesM = kBlockM / kQueryWarps / 16;
  static constexpr int kGradientTilesD = kHeadDim / 8 / (Tile::kWarps / kQueryWarps);
  static_assert(kGradientTilesM > 0 && kGradientTilesD % 2 == 0, "mma.sync works on 16x16 blocks");

  // Shared memory: K (later dK) | V (later dV) | per stage: Q, dO | per score stage: P, then dS | per stage:
  // LSE, D.
  static constexpr int kKeyBytes = kBlockN * kHeadDim * 2;
  static constexpr int kQueryBytes = kBlockM * kHeadDim * 2;
  static constexpr int kScoreBytes = kBlockM * kBlockN * 2;
  static constexpr int kRowBytes = kBlockM * 4;
  static constexpr int kQueryAt = 2 * kKeyBytes;
  static constexpr int kScoresAt = kQueryAt + 4 * kQueryBytes;
  static constexpr int kRowsAt = kScoresAt + Tile::kScoreStages * kScoreBytes;
  static constexpr int kSharedBytes = kRowsAt + 4 * kRowBytes;
};

template <class Config>
struct ModifiedConfig
    : BackwardConfig<Config::kDtype, Config::kHeadDim, Config::kMask, typename Config::Tile, true> {};

}  // namespace flash_attn::mma
