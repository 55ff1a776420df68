// Launches attention over a KV cache on Hopper: many rows with the forward kernel, few with the mma design's.
#pragma once

#include <cuda_runtime.h>

#include <numeric>

#include "mma/cache/launch.cuh"
#include "ops/append.h"
#include "ops/combine.h"
#include "wgmma/cache/cache_keys.cuh"
#include "wgmma/forward/launch.cuh"

namespace flash_attn::wgmma {

template <class Few, class Several, class Long, class Many>
Status launch_cache(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  if (!params.long_tiles || !cache_aligned(params)) {
    return mma::launch_cache<Few, Several, Many>(params, device, stream, name);
  }
  CacheArguments arguments{};
  arguments.box_rows = params.page_size > 0 ? std::gcd(params.page_size, Long::kBlockN) : Long::kBlockN;
  arguments.boxes = Long::kBlockN / arguments.box_rows;
  Status status = launch_append(params, device, stream, arguments.params);
  if (status == Status::kOk) status = launch_tiles<Long>(arguments, device, stream, name);
  if (status != Status::kOk || params.num_splits == 1) return status;
  return launch_combine(params, device, stream);
}

}  // namespace flash_attn::wgmma
