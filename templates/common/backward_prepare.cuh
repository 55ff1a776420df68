// First kernel of a backward call: D = rowsum(dO * O) (FlashAttention-2, section 3.1.2), the LSE in log2
// units, less the exponent of P's factor, and zeros for what the main kernel adds to. Bound by memory: it
// reads dO and O once, and writes dQ in fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/backward_workspace.cuh"
#include "common/dtype.cuh"
#include "common/softmax.cuh"

namespace flash_attn {

constexpr int kPrepareThreads = 256;

struct PrepareArguments {
  BackwardParams params;
  int tiles;  // of kWorkspaceRows rows, for each head
};

// Rows of a sequence in the workspace, its padding included.
__device__ __forceinline__ int64_t padded_rows(const BackwardParams& params, int batch) {
  const ForwardParams& forward = params.forward;
  if (forward.cu_seqlens_q == nullptr) return params.rows;
  const int64_t end = batch + 1 < forward.batch ? workspace_row(params, batch + 1, 0) : params.rows;
  return end - workspace_row(params, batch, 0);
}

template <Dtype kDtype>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack<kDtype>(x[i]), v = unpack<kDtype>(y[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// D and the LSE of the tile of rows from `first_row` on; kLanes lanes share a row.
template <class Config>
__device__ __forceinline__ void prepare_rows(const BackwardParams& params, const Sequence& sequence,
                                             int batch, int head, int64_t first_row) {
  using Element = typename Config::Element;
  constexpr int kLanes = Config::kHeadDim > 128 ? 32 : Config::kHeadDim > 64 ? 16 : Config::kHeadDim / 8;
  const ForwardParams& forward = params.forward;
  const int lane = threadIdx.x % kLanes;
  const int64_t workspace = workspace_row(params, batch, head);
#pragma unroll 4
  for (int i = threadIdx.x / kLanes; i < kWorkspaceRows; i += kPrepareThreads / kLanes) {
    const int64_t row = first_row + i;
    float sum = 0.0f;
    if (row < sequence.seqlen_q && lane * 8 < forward.head_dim_v) {
      const Element* out = sequence.out_rows<Element>(forward, head, row);
      const Element* dout =
          sequence.query_rows(static_cast<const Element*>(params.dout), params.dout_batch_stride,
                              params.dout_row_stride, params.dout_head_stride, head, row);
      sum = dot<Config::kDtype>(reinterpret_cast<const uint4*>(out)[lane],
                                reinterpret_cast<const uint4*>(dout)[lane]);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (lane != 0) continue;
    const float lse = row < sequence.seqlen_q ? *sequence.lse_rows(forward, head, row) * kLog2E -
                                                    static_cast<float>(kProbsExponent<Config::kDtype>)
                                              : INFINITY;
    params.softmax_d[workspace + row] = sum;
    params.softmax_lse_log2[workspace + row] = lse;
    if (params.semaphores != nullptr) params.semaphores[workspace + row] = 0;
  }
}

template <class Config>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ PrepareArguments arguments) {
  const BackwardParams& params = arguments.params;
  const int batch_head = blockIdx.x / arguments.tiles, tile = blockIdx.x % arguments.tiles;
  const int batch = batch_head / params.forward.num_heads, head = batch_head % params.forward.num_heads;
  const Sequence sequence(params.forward, batch);
  const int64_t end_row = padded_rows(params, batch);
  // Rows past the last sequence may be more than the tiles of the longest one.
  for (int64_t row = int64_t{tile} * kWorkspaceRows; row < end_row;
       row += int64_t{arguments.tiles} * kWorkspaceRows) {
    prepare_rows<Config>(params, sequence, batch, head, row);
    if (params.dq == nullptr || row >= sequence.seqlen_q) continue;
    auto* sums = reinterpret_cast<float4*>(params.dq_accumulator +
                                           (workspace_row(params, batch, head) + row) * Config::kHeadDim);
#pragma unroll 8
    for (int i = threadIdx.x; i < kWorkspaceRows * Config::kHeadDim / 4; i += kPrepareThreads) {
      sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
}

}  // namespace flash_attn
