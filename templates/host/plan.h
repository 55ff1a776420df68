// The plan of a call, from the tiles of its kernel: into how many parts the keys of a call over a KV cache
// are split and which design computes it, into how many parts the heads of a backward are split.
#pragma once

#include "abi.h"
#include "problem/kv_cache.cuh"

namespace flash_attn {

// Keys, columns and warps of a backward's tile.
struct BackwardTiles {
  int keys;
  int head_dim;
  int warps;
};

// What a plan reads of a kernel's tiles: nothing in a forward, which has no plan.
template <class Params>
struct PlannedTiles {
  struct Type {};
};
template <>
struct PlannedTiles<CacheParams> {
  using Type = CacheTiles;
};
template <>
struct PlannedTiles<BackwardParams> {
  using Type = BackwardTiles;
};

// A number of splits that `params` gives is kept, 0 asks for the best one. Not read are the design, the parts
// of a backward, and workspaces, whose sizes follow from the plan. `at_once` thread blocks run at a time.
CachePlan plan_cache(const CacheParams& params, const CacheTiles& tiles, int multiprocessors);
BackwardPlan plan_backward(const BackwardParams& params, const BackwardTiles& tiles, int at_once);

}  // namespace flash_attn
