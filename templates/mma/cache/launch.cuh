// Launches attention over a KV cache: appends new keys, attends, and merges what several thread blocks have
// of a row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/cache/kernel.cuh"
#include "ops/append.h"
#include "ops/combine.h"
#include "problem/kv_cache.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

template <class Config>
Status launch_tiles(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  const ForwardParams& forward = params.forward;
  if (forward.total_q == 0) return Status::kOk;
  const int group = forward.num_heads / forward.num_heads_k;
  const int64_t rows = int64_t{forward.seqlen_q} * group;
  // At least one, for the rows past the last sequence.
  const int64_t tiles_m = std::max<int64_t>((rows + Config::kBlockM - 1) / Config::kBlockM, 1);
  const int64_t batches = int64_t{forward.batch} + (forward.cu_seqlens_q != nullptr ? 1 : 0);
  const int64_t blocks = forward.num_heads_k * tiles_m * params.num_splits;
  const SplitArguments arguments{params, forward.num_heads_k, static_cast<int>(tiles_m), group,
                                 static_cast<int>(blocks)};
  // Loads of elements leave sectors in L1, which rows that are not aligned share: none may be read while the
  // kernel before still appends others.
  const bool dependent = appends(params) && Config::kAligned;
  static std::atomic<uint64_t> prepared;
  return launch_kernel(split_kernel<Config>, name, device.index, batches * blocks, Config::kThreads,
                       Config::kSharedBytes, stream, arguments, prepared, dependent);
}

// Runs the first configuration, in ascending order of kBlockM, that holds all rows of a sequence; else the
// last.
template <class Config, class... Others>
Status launch_attention(const CacheParams& params, const Device& device, cudaStream_t stream,
                        const char* name) {
  const ForwardParams& forward = params.forward;
  if constexpr (sizeof...(Others) > 0) {
    const int64_t rows = int64_t{forward.seqlen_q} * (forward.num_heads / forward.num_heads_k);
    if (rows > Config::kBlockM) return launch_attention<Others...>(params, device, stream, name);
  }
  const auto launch = needs_modifiers(forward) ? launch_tiles<ModifiedSplit<Config>> : launch_tiles<Config>;
  return launch(params, device, stream, name);
}

// For a cache that is not aligned the tiles for several rows serve any number.
template <class Few, class Several, class... Others>
Status launch_cache(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  CacheParams attention;
  Status status = launch_append(params, device, stream, attention);
  if (status != Status::kOk) return status;
  const auto launch = cache_aligned(params) ? launch_attention<Few, Several, Others...>
                                            : launch_tiles<UnalignedSplit<Several>>;
  status = launch(attention, device, stream, name);
  if (status != Status::kOk || params.num_splits == 1) return status;
  return launch_combine(params, device, stream);
}

}  // namespace flash_attn::mma
