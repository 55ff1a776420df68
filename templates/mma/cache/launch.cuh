// Launches attention over a KV cache: appends new keys, attends, and merges what several thread blocks have
// of a row.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "host/launch.h"
#include "mma/cache/kernel.cuh"
#include "ops/append.h"
#include "ops/combine.h"
#include "problem/kv_cache.cuh"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

template <class Config, class Scores, bool kAligned>
Status launch_scores(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  const ForwardParams& forward = params.forward;
  if (forward.total_q == 0) return Status::kOk;
  const int group = forward.num_heads / forward.num_heads_k;
  const int64_t rows = group_rows(forward);
  // The rows past the last sequence need at least one.
  const int64_t tiles_m = std::max<int64_t>((rows + Config::kBlockM - 1) / Config::kBlockM, 1);
  const int64_t batches = int64_t{forward.batch} + (forward.cu_seqlens_q != nullptr ? 1 : 0);
  const int64_t blocks = grid_size({forward.num_heads_k, tiles_m, params.num_splits});
  const CacheArguments arguments{params, forward.num_heads_k, static_cast<int>(tiles_m), group,
                                 static_cast<int>(blocks)};
  // Loads of elements leave sectors in L1, which rows that are not aligned share: none may be read while the
  // kernel before still appends others.
  const bool dependent = appends(params) && kAligned;
  static std::atomic<uint64_t> prepared;
  return launch_kernel(cache_kernel<Config, Scores, kAligned>, name, device.index,
                       grid_size({batches, blocks}), Config::kThreads, Config::kSharedBytes, stream,
                       arguments, prepared, dependent);
}

template <class Config>
Status launch_tile(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  const auto launch = needs_modifiers(params.forward) ? launch_scores<Config, ModifiedScores, true>
                                                      : launch_scores<Config, PlainScores, true>;
  return launch(params, device, stream, name);
}

template <class Config>
constexpr TileShape shape_of() {
  if constexpr (std::is_void_v<Config>) {
    return {};
  } else {
    return {Config::kBlockM, Config::kBlockN};
  }
}

// Tiles: Rows16, Rows64, and Rows128 where the family has it; mma_tile chooses. Only Rows64 has a kernel for
// a cache that is not aligned, with modifiers or not.
template <class Tiles>
Status launch_attention(const CacheParams& params, const Device& device, cudaStream_t stream,
                        const char* name) {
  using Rows16 = typename Tiles::Rows16;
  using Rows64 = typename Tiles::Rows64;
  using Rows128 = typename Tiles::Rows128;
  constexpr CacheTiles kTiles{shape_of<Rows16>(), shape_of<Rows64>(), shape_of<Rows128>(), {}};
  const bool aligned = cache_aligned(params);
  const int rows = mma_tile(kTiles, group_rows(params.forward), aligned).rows;
  if (rows == kTiles.rows16.rows) return launch_tile<Rows16>(params, device, stream, name);
  if constexpr (!std::is_void_v<Rows128>) {
    if (rows == kTiles.rows128.rows) return launch_tile<Rows128>(params, device, stream, name);
  }
  if (aligned) return launch_tile<Rows64>(params, device, stream, name);
  return launch_scores<Rows64, ModifiedScores, false>(params, device, stream, name);
}

template <class Tiles>
Status launch_cache(const CacheParams& params, const Device& device, cudaStream_t stream, const char* name) {
  CacheParams attention;
  Status status = launch_append(params, device, stream, attention);
  if (status == Status::kOk) status = launch_attention<Tiles>(attention, device, stream, name);
  if (status != Status::kOk || params.num_splits == 1) return status;
  return launch_combine(params, device, stream);
}

}  // namespace flash_attn::mma
