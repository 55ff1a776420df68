// dK and dV to global memory: by one thread block, or, where several share the keys by heads of Q, as partial
// sums that another kernel adds up.
#pragma once

#include <cstdint>

#include "mma/backward/steps.cuh"
#include "problem/schedule.cuh"
#include "warp/store_tile.cuh"

namespace flash_attn::mma {

struct BackwardArguments {
  BackwardParams params;
  TileSchedule schedule;  // of blocks of keys
};

// This lane's first element of its warp's rows of dV or dK in the workspace, as thread block `part` of those
// that share the keys leaves them.
template <class Config>
__device__ __forceinline__ float4* partial_gradient(const KeyTile<Config>& keys, int part, bool value_warp) {
  const BackwardParams& params = keys.params;
  const bool varlen = params.forward.cu_seqlens_k != nullptr;
  const int64_t heads = int64_t{params.forward.num_heads_k} * (varlen ? 1 : params.forward.batch);
  const int64_t row = (int64_t{part} * 2 + value_warp) * heads * params.key_rows +
                      workspace_key_row(params, keys.batch, keys.key_head()) + keys.first_key() +
                      threadIdx.x / 32 % Config::kPairs * Config::kWarpKeys;
  return reinterpret_cast<float4*>(params.key_partials + row * Config::kHeadDim) + threadIdx.x % 32;
}

// The epilogue of a warp where several parts share the keys: fp32, in the order of its registers.
template <class Config>
__device__ __forceinline__ void store_partial_gradient(const KeyGradient<Config>& gradient,
                                                       const KeyTile<Config>& keys, bool value_warp) {
  float4* partial = partial_gradient(keys, keys.head % keys.params.key_parts, value_warp);
#pragma unroll
  for (int i = 0; i < Config::kTilesKeys * Config::kTilesD; ++i) {
    const float* g = gradient[i / Config::kTilesD][i % Config::kTilesD];
    partial[i * 32] = make_float4(g[0], g[1], g[2], g[3]);
  }
}

// The epilogue of a warp: its rows of dV or dK, through the shared memory that held V or K.
template <class Config>
__device__ __forceinline__ void store_key_gradient(const KeyGradient<Config>& gradient,
                                                   const KeyTile<Config>& keys,
                                                   const PairShare<Config>& share, bool value_warp) {
  using Element = typename Config::Element;
  const BackwardParams& params = keys.params;
  const float scale = value_warp ? params.forward.dropout_rescale / kProbsFactor<Config::kDtype>
                                 : params.forward.softmax_scale;
  float factor[2 * Config::kTilesKeys];
#pragma unroll
  for (float& f : factor) f = scale;
  const uint32_t shared = share.shared + (value_warp ? Config::kKeyBytes : 0);
  const int columns = value_warp ? params.forward.head_dim_v : params.forward.head_dim;
  auto* first = static_cast<Element*>(value_warp ? params.dv : params.dk);
  const int64_t batch_stride = value_warp ? params.dv_batch_stride : params.dk_batch_stride;
  const int64_t row_stride = value_warp ? params.dv_row_stride : params.dk_row_stride;
  const int64_t head_stride = value_warp ? params.dv_head_stride : params.dk_head_stride;
  first =
      keys.sequence.key_rows(first, batch_stride, row_stride, head_stride, keys.key_head(), keys.first_key());
  store_tile<Config::kDtype, Config::kHeadDim>(shared, gradient, factor, share.key, 0, keys.keys(), columns,
                                               [&](int row) { return first + row * row_stride; });
}

// Sums of the parts' gradients, always in the same order.
template <class Config>
__device__ __forceinline__ void load_partial_gradients(KeyGradient<Config>& gradient,
                                                       const KeyTile<Config>& keys, bool value_warp) {
  for (int part = 0; part < keys.params.key_parts; ++part) {
    const float4* partial = partial_gradient(keys, part, value_warp);
#pragma unroll
    for (int i = 0; i < Config::kTilesKeys * Config::kTilesD; ++i) {
      const float4 p = partial[i * 32];
      float* g = gradient[i / Config::kTilesD][i % Config::kTilesD];
      g[0] += p.x, g[1] += p.y, g[2] += p.z, g[3] += p.w;
    }
  }
}

// Zeroes the rows of dK and dV past the last varlen sequence, of which this is block `block` of `blocks`.
template <class Config>
__device__ __forceinline__ void zero_keys(const BackwardParams& params, int key_head, int block,
                                          int64_t blocks) {
  using Element = typename Config::Element;
  const ForwardParams& forward = params.forward;
  if (params.dk == nullptr) return;
  const int64_t first = forward.cu_seqlens_k[forward.batch], rows = forward.total_k - first;
  const int64_t thread = int64_t{block} * Config::kThreads + threadIdx.x, threads = blocks * Config::kThreads;
  const auto zero = [&](void* gradient, int64_t row_stride, int64_t head_stride, int head_dim) {
    zero_rows(static_cast<Element*>(gradient) + first * row_stride + key_head * head_stride, row_stride, rows,
              head_dim / 8, thread, threads);
  };
  zero(params.dk, params.dk_row_stride, params.dk_head_stride, forward.head_dim);
  zero(params.dv, params.dv_row_stride, params.dv_head_stride, forward.head_dim_v);
}

// Adds up what the parts have left.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    combine_parts_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const BackwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const Sequence sequence(params.forward, tile.batch);
  if (tile.batch == params.forward.batch || tile.m_block * Config::kBlockN >= sequence.seqlen_k) return;
  const KeyTile<Config> keys(params, sequence, tile.batch, tile.head * params.key_parts, tile.m_block);
  const bool value_warp = threadIdx.x / 32 < Config::kPairs;
  KeyGradient<Config> gradient = {};
  load_partial_gradients(gradient, keys, value_warp);
  store_key_gradient(gradient, keys, PairShare<Config>(shared_memory), value_warp);
}

}  // namespace flash_attn::mma
