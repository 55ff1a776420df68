// Launches the kernels of a backward call one after the other.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

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

// The first kernel: D, the LSE in log2 units, and zeros for what the main kernel adds to.
template <class Config>
Status launch_prepare(const BackwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  const ForwardParams& forward = params.forward;
  const PrepareArguments arguments{params, (forward.seqlen_q + kWorkspaceRows - 1) / kWorkspaceRows};
  static std::atomic<uint64_t> prepared;
  return launch_kernel(prepare_kernel<Config>, name, device.index,
                       int64_t{forward.batch} * forward.num_heads * arguments.tiles, kPrepareThreads, 0,
                       stream, arguments, prepared);
}

// dK and dV, and dQ in fp32; where several thread blocks share the keys, then the sums of what they have.
template <class Config>
Status launch_main(const BackwardParams& params, const Device& device, cudaStream_t stream,
                   const char* name) {
  const auto schedule = [&](int parts, bool ordered) {
    return make_key_schedule(params.forward, Config::kBlockN, parts,
                             Config::kMask == Mask::kCausal || ordered, kBackwardSectionBytes);
  };
  static std::atomic<uint64_t> prepared[3];
  const BackwardArguments arguments{params, schedule(params.key_parts, params.semaphores != nullptr)};
  const bool modified = needs_modifiers(params.forward);
  const auto kernel =
      modified ? backward_kernel<Config, ModifiedScores> : backward_kernel<Config, PlainScores>;
  const Status status =
      launch_kernel(kernel, name, device.index, arguments.schedule.num_tiles(), Config::kThreads,
                    Config::kSharedBytes, stream, arguments, prepared[modified]);
  if (status != Status::kOk || params.dk == nullptr || params.key_parts == 1) return status;
  const BackwardArguments combine{params, schedule(1, false)};
  return launch_kernel(combine_parts_kernel<Config>, name, device.index, combine.schedule.num_tiles(),
                       Config::kThreads, 2 * Config::kKeyBytes, stream, combine, prepared[2]);
}

// The last kernel: dQ in 16 bits.
template <class Config>
Status launch_convert(const BackwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  const ForwardParams& forward = params.forward;
  const ConvertArguments arguments{params, (forward.seqlen_q + Config::kBlockM - 1) / Config::kBlockM};
  const int64_t batches = int64_t{forward.batch} + (forward.cu_seqlens_q != nullptr ? 1 : 0);
  static std::atomic<uint64_t> prepared;
  return launch_kernel(convert_kernel<Config>, name, device.index,
                       batches * forward.num_heads * arguments.tiles, Config::kThreads, Config::kQueryBytes,
                       stream, arguments, prepared);
}

template <class Config>
Status launch_tile(const BackwardParams& params, const Device& device, cudaStream_t stream,
                   const char* name) {
  Status status = launch_prepare<Config>(params, device, stream, name);
  if (status != Status::kOk || (params.dq == nullptr && params.dk == nullptr)) return status;
  status = launch_main<Config>(params, device, stream, name);
  if (status != Status::kOk || params.dq == nullptr) return status;
  return launch_convert<Config>(params, device, stream, name);
}

template <class Tiles>
Status launch_backward(const BackwardParams& params, const Device& device, cudaStream_t stream,
                       const char* name) {
  return with_tile<Tiles>(
      device, [&](auto config) { return launch_tile<decltype(config)>(params, device, stream, name); });
}

}  // namespace flash_attn::mma
