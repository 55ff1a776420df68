// Launches Hopper's forward kernel with the tile that suits the call.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "host/device.h"
#include "host/launch.h"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"
#include "wgmma/forward/kernel.cuh"
#include "wgmma/forward/tensor_keys.cuh"
#include "wgmma/tensors.cuh"

namespace flash_attn::wgmma {

// An H200 has 60 MB of L2.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

// Whether the tile was made for calls such as this one, by an estimate of the keys that a query sees.
template <class Config>
bool suits(const ForwardParams& params) {
  const int hidden = Config::kMask == Mask::kCausal ? std::min(params.seqlen_q, params.seqlen_k) / 2 : 0;
  const int mean_keys = params.seqlen_k - hidden;
  return params.head_dim_v <= Config::kHeadDimV &&
         (Config::Tile::kMaxKeys == 0 || mean_keys <= Config::Tile::kMaxKeys);
}

// How many query heads to pack into the rows of a tile: the whole group that shares keys, or 1. It pays where
// a tile has more rows than there are queries.
inline int group_to_pack(const ForwardParams& params, int block_m) {
  const int group = params.num_heads / params.num_heads_k;
  if (block_m % group != 0 || needs_modifiers(params)) return 1;
  const auto filled = [&](int64_t rows) {
    return static_cast<double>(rows) / static_cast<double>((rows + block_m - 1) / block_m * block_m);
  };
  return filled(params.seqlen_q) < 0.9 * filled(int64_t{params.seqlen_q} * group) ? group : 1;
}

// Completes the arguments, which hold the parameters, and launches the kernel that suits them.
template <class Config, class Arguments>
Status launch_tiles(Arguments& arguments, const Device& device, cudaStream_t stream, const char* name) {
  const ForwardParams& params = arguments.forward();
  arguments.group = group_to_pack(params, Config::kBlockM);
  arguments.schedule = make_schedule(params, Config::kBlockM, Config::kMask, kSectionBytes, arguments.group);
  if (arguments.num_tiles() == 0 || params.total_q == 0) return Status::kOk;
  if (arguments.num_tiles() > std::numeric_limits<int32_t>::max() - device.multiprocessors) {
    return fail(Status::kInvalidArgument, "%s would need %lld tiles; the limit is 2^31 - 1 less one per SM",
                name, static_cast<long long>(arguments.num_tiles()));
  }
  const Status status = make_tensor_maps<Config>(arguments.maps, params, arguments.keys(Config::kBlockN),
                                                 arguments.group, name);
  if (status != Status::kOk) return status;
  const int64_t blocks = std::min<int64_t>(arguments.num_tiles(), device.multiprocessors);
  constexpr void (*kKernels[])(Arguments) = {forward_kernel<Config, Variant::kPlain, Arguments>,
                                             forward_kernel<Config, Variant::kModified, Arguments>,
                                             forward_kernel<Config, Variant::kPacked, Arguments>};
  const int variant = needs_modifiers(params) ? 1 : arguments.group > 1 ? 2 : 0;
  static std::atomic<uint64_t> prepared[3];
  return launch_kernel(kKernels[variant], name, device.index, blocks, Config::kThreads, Config::kSharedBytes,
                       stream, arguments, prepared[variant]);
}

// Runs the first configuration that suits the call; the last one in any case.
template <class Config, class... Others>
Status launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  if constexpr (sizeof...(Others) > 0) {
    if (!suits<Config>(params)) return launch_forward<Others...>(params, device, stream, name);
  }
  ForwardArguments arguments{};
  arguments.params = params;
  return launch_tiles<Config>(arguments, device, stream, name);
}

}  // namespace flash_attn::wgmma
