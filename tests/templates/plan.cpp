// The plans of templates/host for tests to call: plain C++.
#include "host/plan.cu"

namespace flash_attn {

extern "C" {

void make_cache_plan(const CacheParams* params, const CacheTiles* tiles, int multiprocessors,
                     CachePlan* plan) {
  *plan = plan_cache(*params, *tiles, multiprocessors);
}

void make_backward_plan(const BackwardParams* params, const BackwardTiles* tiles, int multiprocessors,
                        BackwardPlan* plan) {
  *plan = plan_backward(*params, *tiles, multiprocessors);
}

// Rows of the mma design's tile.
int mma_rows(const CacheParams* params, const CacheTiles* tiles) {
  return mma_tile(*tiles, group_rows(params->forward), cache_aligned(*params)).rows;
}

int packed_heads(const ForwardParams* params, int block_m) { return group_to_pack(*params, block_m); }

}  // extern "C"

}  // namespace flash_attn
