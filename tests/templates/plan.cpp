// The plans of templates/host for tests to call: plain C++.
#include "host/plan.cu"
#include "host/launch.h"

namespace flash_attn {

extern "C" {

void make_cache_plan(const CacheParams* params, const CacheTiles* tiles, int multiprocessors,
                     CachePlan* plan) {
  *plan = plan_cache(*params, *tiles, multiprocessors);
}

void make_backward_plan(const BackwardParams* params, const BackwardTiles* tiles, int at_once,
                        BackwardPlan* plan) {
  *plan = plan_backward(*params, *tiles, at_once);
}

// Thread blocks of a backward that run at a time on a multiprocessor with so much shared memory.
int resident(int shared_bytes_per_multiprocessor, int warps, int shared_bytes) {
  Device device{};
  device.shared_bytes_per_multiprocessor = shared_bytes_per_multiprocessor;
  return resident_backward_blocks(device, warps, shared_bytes);
}

// Rows of the mma design's tile.
int mma_rows(const CacheParams* params, const CacheTiles* tiles) {
  return mma_tile(*tiles, group_rows(params->forward), cache_aligned(*params)).rows;
}

int packed_heads(const ForwardParams* params, int block_m) { return group_to_pack(*params, block_m); }

}  // extern "C"

}  // namespace flash_attn
