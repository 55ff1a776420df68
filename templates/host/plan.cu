// Models of the time that a call takes. Plain C++: the tests compile it without CUDA.
//
// Few queries over a KV cache make few thread blocks, and few thread blocks cannot read memory at full speed.
// Splitting the keys makes more of them. A backward has a thread block for each block of keys of each KV
// head; splitting the query heads that share them makes more. The price is a second kernel, which merges the
// parts.
#include "host/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "problem/schedule.cuh"
#include "problem/work.cuh"

namespace flash_attn {
namespace {

// The unit of all costs is the time in which one multiprocessor works through a block of so many keys.
constexpr double kUnitKeys = 64.0;

// Cost of a thread block besides its keys.
constexpr double kStartCost = 0.5;

// Cost of writing and merging a row of a part of the result. The rows of the smallest tile are free, except
// in the wgmma design.
constexpr double kPartCost = 1.0 / 32.0;

// Cost of merging besides, each time that a warp reads parts.
constexpr double kMergeCost = 2.0;

// Speed of a thread block alone on a multiprocessor, relative to two that share it. It does not keep the
// tensor cores busy, which bound all tiles but the smallest; that one is bound by memory.
constexpr double kAlone = 0.6;

// Fewer splits are taken where they cost at most this much more than the best number.
constexpr double kTolerance = 1.02;

// Time of a row in the wgmma design over that in the largest tile of the mma design, measured on an H200.
constexpr double kWgmmaCost = 0.5;

// Tiles of the wgmma design for each multiprocessor from which on their keys are not split: many tiles share
// out evenly enough, also where the capacity of a cache says little about lengths.
constexpr double kEnoughTiles = 2.0;

// Thread blocks of a backward, for each of those that run at a time, from which on splitting costs more than
// it brings, measured on an H200. Under a mask they differ in length, and many short ones share out better.
constexpr double kEnoughThreadBlocks = 0.9;
constexpr double kEnoughMaskedThreadBlocks = 15.0;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of one design for a call over a cache. Counts of what all sequences have are doubles, in which no
// product of sizes overflows.
struct Tiling {
  TileShape shape;
  double tiles;
  int64_t key_blocks;  // of a sequence, at least 1
  int multiprocessors;

  Tiling(const CacheParams& params, const TileShape& shape, int group, int multiprocessors)
      : shape(shape),
        tiles(1.0 * params.forward.batch * (params.forward.num_heads / group) *
              ceil_div(int64_t{params.forward.seqlen_q} * group, shape.rows)),
        key_blocks(std::max<int64_t>(ceil_div(params.forward.seqlen_k, shape.keys), 1)),
        multiprocessors(multiprocessors) {}

  // Thread blocks, one after the other, of the multiprocessor that ends last.
  double thread_blocks(int splits) const { return std::ceil(tiles * splits / multiprocessors); }

  // Cost of the keys of a thread block. Multiprocessors share the memory's speed evenly.
  double key_cost(int splits) const { return ceil_div(key_blocks, splits) * shape.keys / kUnitKeys; }
};

double mma_cost(const Tiling& tiling, const CacheTiles& tiles, int splits) {
  const int paid_rows = tiling.shape.rows - tiles.rows16.rows;
  double thread_blocks = tiling.thread_blocks(splits);
  if (paid_rows > 0 && std::fmod(thread_blocks, 2.0) != 0.0) thread_blocks += 1.0 / kAlone - 1.0;
  const double cost = thread_blocks * (tiling.key_cost(splits) + kStartCost);
  return splits == 1 ? cost : cost + thread_blocks * paid_rows * kPartCost + kMergeCost;
}

// A multiprocessor works on one tile at a time. All of them share the memory that parts of `rows` rows are
// written to and merged from.
double wgmma_cost(const Tiling& tiling, const CacheTiles& tiles, double rows, int splits) {
  const double cost = tiling.thread_blocks(splits) * (tiling.key_cost(splits) + kStartCost) * kWgmmaCost *
                      tiling.shape.rows / largest_mma_tile(tiles).rows;
  if (splits == 1) return cost;
  const int64_t merged_at_once = kMergedAtOnce * merging_warps(rows, splits, tiling.multiprocessors);
  return cost + rows * splits / tiling.multiprocessors * kPartCost +
         ceil_div(splits, merged_at_once) * kMergeCost;
}

struct Choice {
  int splits;
  double cost;
};

// The fewest splits that cost hardly more than the best number, which `cost` tells. Of those with equally
// many blocks of keys in each, only the least number is worth a look.
template <class Cost>
Choice cheapest(int64_t key_blocks, Cost cost) {
  const int most = static_cast<int>(std::min<int64_t>(key_blocks, kMaxSplits));
  const auto next = [&](int splits) {
    const int64_t blocks_each = ceil_div(key_blocks, splits);
    return blocks_each == 1 ? most + 1 : static_cast<int>(ceil_div(key_blocks, blocks_each - 1));
  };
  double least = cost(1);
  for (int splits = next(1); splits <= most; splits = next(splits)) least = std::min(least, cost(splits));
  int splits = 1;
  while (cost(splits) > kTolerance * least) splits = next(splits);
  return {splits, cost(splits)};
}

// The best number of splits, unless it is `given` or there is but one that is worth a look.
template <class Cost>
Choice choose(int given, bool single, const Tiling& tiling, Cost cost) {
  if (given == 0 && !single) return cheapest(tiling.key_blocks, cost);
  const int splits = given > 0 ? given : 1;
  return {splits, cost(splits)};
}

CachePlan plan_of(const Choice& choice, Design design) {
  return {choice.splits, static_cast<int32_t>(design)};
}

}  // namespace

CachePlan plan_cache(const CacheParams& params, const CacheTiles& tiles, int multiprocessors) {
  const ForwardParams& forward = params.forward;
  const int64_t rows = group_rows(forward);
  const bool aligned = cache_aligned(params);
  const int group = std::max(forward.num_heads / forward.num_heads_k, 1);
  const Tiling mma(params, mma_tile(tiles, rows, aligned), group, multiprocessors);
  const Choice best = choose(params.num_splits, mma.tiles == 0.0, mma,
                             [&](int splits) { return mma_cost(mma, tiles, splits); });
  // Memory bounds calls with few rows, whichever design computes them.
  if (tiles.wgmma.rows == 0 || !aligned || rows <= tiles.rows64.rows) return plan_of(best, Design::kMma);

  const Tiling wgmma(params, tiles.wgmma, group_to_pack(forward, tiles.wgmma.rows), multiprocessors);
  const double total_rows = 1.0 * forward.batch * forward.num_heads * forward.seqlen_q;
  const Choice other = choose(params.num_splits, wgmma.tiles >= kEnoughTiles * multiprocessors, wgmma,
                              [&](int splits) { return wgmma_cost(wgmma, tiles, total_rows, splits); });
  return other.cost <= best.cost ? plan_of(other, Design::kWgmma) : plan_of(best, Design::kMma);
}

BackwardPlan plan_backward(const BackwardParams& params, const BackwardTiles& tiles, int at_once) {
  const ForwardParams& forward = params.forward;
  if (params.dk == nullptr) return {1, tiles.head_dim};
  const int group = forward.num_heads / forward.num_heads_k;
  const double thread_blocks =
      1.0 * forward.batch * forward.num_heads_k * ceil_div(forward.seqlen_k, tiles.keys);
  const bool masked = forward.window_left >= 0 || forward.window_right >= 0;
  const double enough = (masked ? kEnoughMaskedThreadBlocks : kEnoughThreadBlocks) * at_once;
  if (thread_blocks == 0.0) return {1, tiles.head_dim};
  // The least divisor of the group that makes enough thread blocks, or the group.
  int parts = static_cast<int>(std::clamp(std::ceil(enough / thread_blocks), 1.0, 1.0 * group));
  while (group % parts != 0) ++parts;
  return {parts, tiles.head_dim};
}

}  // namespace flash_attn
