// Launches the kernels of a backward call one after the other.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "host/device.h"
#include "host/launch.h"
#include "mma/backward/convert.cuh"
#include "mma/backward/kernel.cuh"
#include "mma/backward/prepare.cuh"
#include "mma/backward/store.cuh"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"

namespace flash_attn::mma {

// Q, dO and dQ of the heads of a section stay in L2 while it runs.
constexpr int64_t kBackwardSectionBytes = int64_t{16} << 20;

// Launches the kernels of a backward call, with the first configuration of which a multiprocessor of
// `device` holds as many thread blocks as it asks for; the last one in any case.
template <class Config, class... Others>
Status launch_backward(const BackwardParams& params, const Device& device, cudaStream_t stream,
                       const char* name) {
  if constexpr (sizeof...(Others) > 0) {
    if (!holds_blocks(device, Config::Tile::kMinBlocks, Config::kSharedBytes))
      return launch_backward<Others...>(params, device, stream, name);
  }
  const ForwardParams& forward = params.forward;
  const bool varlen = forward.cu_seqlens_q != nullptr;
  const int64_t query_heads = int64_t{forward.batch} * forward.num_heads;
  const auto tiles = [&](int rows) { return (forward.seqlen_q + rows - 1) / rows; };
  static std::atomic<uint64_t> prepared[5];

  const PrepareArguments prepare{params, tiles(kWorkspaceRows)};
  Status status = launch_kernel(prepare_kernel<Config>, name, device.index, query_heads * prepare.tiles,
                                kPrepareThreads, 0, stream, prepare, prepared[0]);
  if (status != Status::kOk || (params.dq == nullptr && params.dk == nullptr)) return status;

  const auto schedule = [&](int parts, bool ordered) {
    return make_key_schedule(forward, Config::kBlockN, parts, Config::kMask == Mask::kCausal || ordered,
                             kBackwardSectionBytes);
  };
  const BackwardArguments arguments{params, schedule(params.key_parts, params.semaphores != nullptr)};
  const bool modifiers = needs_modifiers(forward);
  status = launch_kernel(modifiers ? backward_kernel<ModifiedConfig<Config>> : backward_kernel<Config>, name,
                         device.index, arguments.schedule.num_tiles(), Config::kThreads, Config::kSharedBytes,
                         stream, arguments, prepared[1 + modifiers]);
  if (status == Status::kOk && params.dk != nullptr && params.key_parts > 1) {
    const BackwardArguments combine{params, schedule(1, false)};
    status = launch_kernel(combine_kernel<Config>, name, device.index, combine.schedule.num_tiles(),
                           Config::kThreads, 2 * Config::kKeyBytes, stream, combine, prepared[3]);
  }
  if (status != Status::kOk || params.dq == nullptr) return status;

  const ConvertArguments convert{params, tiles(Config::kBlockM)};
  const int64_t tail = varlen ? forward.num_heads : 0;
  return launch_kernel(convert_kernel<Config>, name, device.index, (query_heads + tail) * convert.tiles,
                       Config::kThreads, Config::kQueryBytes, stream, convert, prepared[4]);
}

}  // namespace flash_attn::mma
