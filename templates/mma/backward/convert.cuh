// Last kernel of a backward call: dQ from fp32, in the order in which the main kernel's registers hold it, to
// rows of 16-bit elements.
#pragma once

#include <cstdint>

#include "mma/backward/config.cuh"
#include "mma/backward/workspace.cuh"
#include "problem/sequence.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/store_tile.cuh"

namespace flash_attn::mma {

struct ConvertArguments {
  BackwardParams params;
  int tiles;  // of queries, for each head
};

// A warp's share of a tile of dQ: what it computes in the main kernel, and converts in the last one.
template <class Config>
struct QueryGradientShare {
  static constexpr int kFragments = Config::kGradientTilesM * Config::kGradientTilesD;
  int row;
  int column;

  __device__ __forceinline__ QueryGradientShare() {
    const int warp = threadIdx.x / 32;
    row = warp % Config::kQueryWarps * Config::kGradientTilesM * 16;
    column = warp / Config::kQueryWarps * Config::kGradientTilesD * 8;
  }

  // This lane's first element of the warp's first fragment in the tile of dQ that starts at `row` of the
  // workspace.
  __device__ static __forceinline__ float* sums(const BackwardParams& params, int64_t row) {
    return params.dq_accumulator + row * Config::kHeadDim +
           threadIdx.x / 32 * kFragments * GradientFragment::kFloats +
           threadIdx.x % 32 * GradientFragment::kLaneStride;
  }
};

// Rows of dQ from `row` of the sequence on.
template <class Config>
__device__ __forceinline__ typename Config::Element* gradient_rows(const BackwardParams& params,
                                                                   const Sequence& sequence, int head,
                                                                   int row) {
  return sequence.query_rows(static_cast<typename Config::Element*>(params.dq), params.dq_batch_stride,
                             params.dq_row_stride, params.dq_head_stride, head, row);
}

template <class Config>
__device__ __forceinline__ void convert_tile(const BackwardParams& params, const Sequence& sequence,
                                             int batch, int head, int first_row, uint32_t shared) {
  const QueryGradientShare<Config> share;
  const float* sums = share.sums(params, workspace_row(params, batch, head) + first_row);
  Accumulator<Config::kGradientTilesM, Config::kGradientTilesD> gradient;
#pragma unroll
  for (int i = 0; i < share.kFragments; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      gradient[i / Config::kGradientTilesD][i % Config::kGradientTilesD][c] =
          sums[i * GradientFragment::kFloats + c * GradientFragment::kElementStride];
    }
  }
  float scale[2 * Config::kGradientTilesM];
#pragma unroll
  for (float& factor : scale) factor = params.forward.softmax_scale;
  store_tile<Config::kDtype, Config::kHeadDim>(
      shared, gradient, scale, share.row, share.column, sequence.seqlen_q - first_row,
      params.forward.head_dim,
      [&](int row) { return gradient_rows<Config>(params, sequence, head, first_row + row); });
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    convert_kernel(const __grid_constant__ ConvertArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const BackwardParams& params = arguments.params;
  const int batch_head = blockIdx.x / arguments.tiles, tile = blockIdx.x % arguments.tiles;
  const int batch = batch_head / params.forward.num_heads, head = batch_head % params.forward.num_heads;
  const Sequence sequence(params.forward, batch);
  if (batch == params.forward.batch) {
    for_each_tile(int64_t{tile} * Config::kBlockM, int64_t{arguments.tiles} * Config::kBlockM,
                  sequence.seqlen_q, [&](int row) {
                    zero_rows(gradient_rows<Config>(params, sequence, head, row), params.dq_row_stride,
                              min(sequence.seqlen_q - row, Config::kBlockM), params.forward.head_dim / 8,
                              threadIdx.x, Config::kThreads);
                  });
  } else if (tile * Config::kBlockM < sequence.seqlen_q) {
    convert_tile<Config>(params, sequence, batch, head, tile * Config::kBlockM,
                         ptx::shared_address(shared_memory));
  }
}

}  // namespace flash_attn::mma
