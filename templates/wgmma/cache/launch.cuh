// Launches attention over a KV cache on Hopper: many rows with the forward kernel, few with the mma design's.
#pragma once

#include <cuda_runtime.h>

#include <numeric>

#include "ops/append.h"
#include "ops/combine.h"
#include "problem/kv_cache.cuh"
#include "wgmma/cache/cache_keys.cuh"
#include "wgmma/forward/launch.cuh"

namespace flash_attn::mma {

// Defined in mma/cache/launch.cuh, which a unit includes beside this file: few rows are the other design's.
template <class Tiles>
Status launch_cache(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name);

}  // namespace flash_attn::mma

namespace flash_attn::wgmma {

// Tiles: those of the mma design, and Wgmma, which takes a call if its plan says so and TMA can read the
// cache.
template <class Tiles>
Status launch_cache(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  using Config = typename Tiles::Wgmma;
  if (static_cast<Design>(params.design) != Design::kWgmma || !cache_aligned(params)) {
    return mma::launch_cache<Tiles>(params, device, stream, name);
  }
  CacheKeys source{};
  source.box_rows = params.page_size > 0 ? std::gcd(params.page_size, Config::kBlockN) : Config::kBlockN;
  source.boxes = Config::kBlockN / source.box_rows;
  Status status = launch_append(params, device, stream, source.params);
  if (status == Status::kOk) status = launch_tile<Config>(source, device, stream, name);
  if (status != Status::kOk || params.num_splits == 1) return status;
  return launch_combine(params, device, stream);
}

}  // namespace flash_attn::wgmma
