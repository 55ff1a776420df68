// Launches the forward kernel with the tile that suits the device.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/forward/kernel.cuh"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

// An A100 has 40 MB of L2 in two halves that each cache what their side reads.
constexpr int64_t kSectionBytes = int64_t{16} << 20;

// Runs the first configuration of which a multiprocessor of `device` holds as many thread blocks as it asks
// for; the last one in any case.
template <class Config, class... Others>
Status launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  if constexpr (sizeof...(Others) > 0) {
    if (!holds_blocks(device, Config::Tile::kMinBlocks, Config::kSharedBytes))
      return launch_forward<Others...>(params, device, stream, name);
  }
  const ForwardArguments arguments{params,
                                   make_schedule(params, Config::kBlockM, Config::kMask, kSectionBytes)};
  const bool modifiers = needs_modifiers(params);
  static std::atomic<uint64_t> prepared[2];
  return launch_kernel(modifiers ? forward_kernel<Config, true> : forward_kernel<Config, false>, name,
                       device.index, arguments.schedule.num_tiles(), Config::kThreads, Config::kSharedBytes,
                       stream, arguments, prepared[modifiers]);
}

}  // namespace flash_attn::mma
