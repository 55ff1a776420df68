// Launches the forward kernel with the tile that suits the device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "host/launch.h"
#include "mma/forward/kernel.cuh"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

// K and V of a section: an A100 has 40 MB of L2 in two halves, each of which caches what its side reads.
constexpr int64_t kSectionBytes = int64_t{16} << 20;

template <class Config>
Status launch_tile(const ForwardParams& params, const Device& device, cudaStream_t stream, const char* name) {
  const ForwardArguments arguments{params,
                                   make_schedule(params, Config::kBlockM, Config::kMask, kSectionBytes)};
  const bool modified = needs_modifiers(params);
  const auto kernel = modified ? forward_kernel<Config, ModifiedScores> : forward_kernel<Config, PlainScores>;
  static std::atomic<uint64_t> prepared[2];
  return launch_kernel(kernel, name, device.index, arguments.schedule.num_tiles(), Config::kThreads,
                       Config::kSharedBytes, stream, arguments, prepared[modified]);
}

template <class Tiles>
Status launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  return with_tile<Tiles>(
      device, [&](auto config) { return launch_tile<decltype(config)>(params, device, stream, name); });
}

}  // namespace flash_attn::mma
