// Launches Hopper's forward kernel with the tile that suits the call.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "host/launch.h"
#include "host/tensor_map.h"
#include "problem/schedule.cuh"
#include "warp/scores.cuh"
#include "wgmma/forward/kernel.cuh"
#include "wgmma/forward/tensor_keys.cuh"
#include "wgmma/key_source.cuh"

namespace flash_attn::wgmma {

// K and V of a section: half of an H200's L2 of 60 MB, so that they stay there beside Q and O.
constexpr int64_t kSectionBytes = int64_t{32} << 20;

template <class Config>
Status make_tensor_maps(TensorMaps& maps, const ForwardParams& params, const KeyTensor& keys, int group,
                        const char* name) {
  const bool varlen = params.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : params.batch, d = params.head_dim;
  const int64_t rows_q = varlen ? params.total_q : params.seqlen_q;
  // Without a single key nothing is read of K and V, but a tensor map wants an address and a size.
  const bool no_keys = keys.rows == 0 || keys.batch == 0;
  const int64_t rows_k = no_keys ? 1 : keys.rows, batch_k = no_keys ? 1 : keys.batch;
  const TensorBox q{
      params.q,
      5,
      {d, group, rows_q, params.num_heads / group, batch},
      {params.q_head_stride, params.q_row_stride, group * params.q_head_stride, params.q_batch_stride},
      {64, group, Config::kBlockM / group, 1, 1}};
  const TensorBox k{no_keys ? params.q : params.k,
                    4,
                    {d, rows_k, params.num_heads_k, batch_k},
                    {params.k_row_stride, params.k_head_stride, params.k_batch_stride},
                    {64, keys.box_rows, 1, 1}};
  const TensorBox v{no_keys ? params.q : params.v,
                    4,
                    {params.head_dim_v, rows_k, params.num_heads_k, batch_k},
                    {params.v_row_stride, params.v_head_stride, params.v_batch_stride},
                    {64, keys.box_rows, 1, 1}};
  Status status = make_tensor_map(maps.q, q, Config::kDtype, name);
  if (status == Status::kOk) status = make_tensor_map(maps.k, k, Config::kDtype, name);
  if (status == Status::kOk) status = make_tensor_map(maps.v, v, Config::kDtype, name);
  return status;
}

// Completes a key source that holds the parameters, and launches the kernel that suits them.
template <class Config, class KeySource>
Status launch_tile(KeySource& source, const Device& device, cudaStream_t stream, const char* name) {
  const ForwardParams& params = source.forward();
  if (params.num_heads == 0 || params.total_q == 0) return Status::kOk;
  source.group = group_to_pack(params, Config::kBlockM);
  source.schedule = make_schedule(params, Config::kBlockM, Config::kMask, kSectionBytes, source.group);
  if (source.num_tiles() == 0) return Status::kOk;
  Status status = check_tiles(name, source.num_tiles(), device);
  if (status != Status::kOk) return status;
  status = make_tensor_maps<Config>(source.maps, params, source.tensor(Config::kBlockN), source.group, name);
  if (status != Status::kOk) return status;
  const int64_t blocks = std::min<int64_t>(source.num_tiles(), device.multiprocessors);
  constexpr void (*kKernels[])(KeySource) = {forward_kernel<Config, PlainScores, false, KeySource>,
                                             forward_kernel<Config, PlainScores, true, KeySource>,
                                             forward_kernel<Config, ModifiedScores, false, KeySource>};
  const int kernel = needs_modifiers(params) ? 2 : source.group > 1 ? 1 : 0;
  static std::atomic<uint64_t> prepared[3];
  return launch_kernel(kKernels[kernel], name, device.index, blocks, Config::kThreads, Config::kSharedBytes,
                       stream, source, prepared[kernel]);
}

// Whether the tile was made for calls such as this one, by an estimate of the keys that a query sees.
template <class Config>
bool suits(const ForwardParams& params) {
  const int hidden = Config::kMask == Mask::kCausal ? std::min(params.seqlen_q, params.seqlen_k) / 2 : 0;
  const int mean_keys = params.seqlen_k - hidden;
  return params.head_dim_v <= Config::kHeadDimV &&
         (Config::Tile::kMaxKeys == 0 || mean_keys <= Config::Tile::kMaxKeys);
}

// Tiles: Default; Short for queries that see few keys, and Narrow for a small head dim of V, where there are.
template <class Tiles>
Status launch_forward(const ForwardParams& params, const Device& device, cudaStream_t stream,
                      const char* name) {
  TensorKeys source{};
  source.params = params;
  if constexpr (!std::is_void_v<typename Tiles::Short>) {
    if (suits<typename Tiles::Short>(params)) {
      return launch_tile<typename Tiles::Short>(source, device, stream, name);
    }
  }
  if constexpr (!std::is_void_v<typename Tiles::Narrow>) {
    if (suits<typename Tiles::Narrow>(params)) {
      return launch_tile<typename Tiles::Narrow>(source, device, stream, name);
    }
  }
  return launch_tile<typename Tiles::Default>(source, device, stream, name);
}

}  // namespace flash_attn::wgmma
