// Compile-time description of the backward kernel. The numbers come from the tile table in codegen.
#pragma once

#include <algorithm>

#include "mma/config.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

template <int block_m, int block_n, int warps, int min_blocks, int score_stages>
struct BackwardTile {
  static constexpr int kBlockM = block_m;
  static constexpr int kBlockN = block_n;
  static constexpr int kWarps = warps;
  static constexpr int kMinBlocks = min_blocks;  // thread blocks per multiprocessor that registers must allow
  static constexpr int kScoreStages = score_stages;  // 2: dQ of a step is computed during the next one
};

// Scores that a pair of warps has in registers at a time.
constexpr int kScoresAtOnce = 2048;

// How many of `warps` split the rows of dQ; the others split its columns, in multiples of 16. Most rows per
// warp, up to 32, mean least traffic in shared memory.
constexpr int warps_along_queries(int block_m, int head_dim, int warps) {
  int along_m = block_m > 32 ? block_m / 32 : 1;
  while (head_dim / 16 % (warps / along_m) != 0) along_m *= 2;
  return along_m;
}

template <Dtype dtype, int head_dim, Mask mask, class Tile, class ScoresType = PlainScores>
struct BackwardConfig : MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarps> {
  using Base = MmaConfig<dtype, head_dim, mask, Tile, Tile::kWarps>;
  using Base::kBlockM, Base::kBlockN, Base::kQueryBytes, Base::kKeyBytes;
  using Scores = ScoresType;
  static_assert(kWorkspaceRows % kBlockM == 0 && kWorkspaceRows % kBlockN == 0,
                "a sequence's rows in the workspace are whole tiles");
  static_assert(Tile::kWarps <= kBlockM, "a tile has as many semaphores as rows, and uses one per warp");

  // A pair of warps shares kWarpKeys keys, for kChunk queries at a time: one warp has dV, the other dK. With
  // modifiers the scores of a chunk need twice the registers.
  static constexpr int kPairs = Tile::kWarps / 2;
  static constexpr int kWarpKeys = kBlockN / kPairs;
  static constexpr int kPlainChunk = std::min(kBlockM, kScoresAtOnce / kWarpKeys);
  static constexpr int kModifiedChunk = std::min(kBlockM, kScoresAtOnce / 2 / kWarpKeys);
  static constexpr int kChunk = Scores::kFolded ? kPlainChunk : kModifiedChunk;
  static constexpr int kChunks = kBlockM / kChunk;
  static constexpr int kTilesKeys = kWarpKeys / 16;
  static constexpr int kTilesQueries = kChunk / 8;
  static constexpr int kTilesD = head_dim / 8;
  static_assert(kWarpKeys % 16 == 0 && kChunk % 16 == 0 && kBlockM % kChunk == 0,
                "mma.sync works on 16x16 blocks");
  static_assert(1 + kPairs * kChunks <= 16, "there are 16 barriers");

  // A warp's share of dQ.
  static constexpr int kQueryWarps = warps_along_queries(kBlockM, head_dim, Tile::kWarps);
  static constexpr int kGradientTilesM = kBlockM / kQueryWarps / 16;
  static constexpr int kGradientTilesD = head_dim / 8 / (Tile::kWarps / kQueryWarps);
  static_assert(kGradientTilesM > 0 && kGradientTilesD % 2 == 0, "mma.sync works on 16x16 blocks");

  // Shared memory: K (later dK) | V (later dV) | per stage: Q, dO | per score stage: P, then dS | per stage:
  // LSE, D.
  static constexpr int kScoreBytes = kBlockM * kBlockN * 2;
  static constexpr int kRowBytes = kBlockM * 4;
  static constexpr int kQueryAt = 2 * kKeyBytes;
  static constexpr int kScoresAt = kQueryAt + 4 * kQueryBytes;
  static constexpr int kRowsAt = kScoresAt + Tile::kScoreStages * kScoreBytes;
  static constexpr int kSharedBytes = kRowsAt + 4 * kRowBytes;
};

// The configuration of a kernel with these scores.
template <class Config, class Scores>
struct ScoredConfig
    : BackwardConfig<Config::kDtype, Config::kHeadDim, Config::kMask, typename Config::Tile, Scores> {};

}  // namespace flash_attn::mma
