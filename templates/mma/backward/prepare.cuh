// First kernel of a backward call: D = rowsum(dO * O) (FlashAttention-2, section 3.1.2), the LSE in log2
// units, less the exponent of P's factor, and zeros for what the main kernel adds to. Bound by memory: it
// reads dO and O once, and writes dQ in fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "mma/backward/workspace.cuh"
#include "mma/products.cuh"
#include "problem/sequence.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/shared_tile.cuh"
#include "warp/softmax.cuh"

namespace flash_attn::mma {

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

// What a warp stages of O and dO: 16 rows each, some columns at a time.
template <class Config>
struct PrepareStage {
  static constexpr int kRows = 16;
  static constexpr int kColumns = Config::kHeadDim % 64 == 0 ? 64 : 32;
  using Tile = SharedTile<kColumns>;
  static constexpr int kOutBytes = kRows * Tile::kRowBytes;
  static constexpr int kBytes = 2 * kOutBytes;
};

// Brings 16 rows of O and dO, some columns from `column` on, to shared memory; what is not there is zero.
template <class Config>
__device__ __forceinline__ void stage_rows(const typename Config::Element* out, int64_t out_stride,
                                           const typename Config::Element* dout, int64_t dout_stride,
                                           int64_t rows, int columns, int column, uint32_t shared) {
  using Stage = PrepareStage<Config>;
  constexpr int kChunks = Stage::kColumns / 8, kRowsPerPass = 32 / kChunks;
  constexpr int kPasses = Stage::kRows / kRowsPerPass;
  const int lane = lane_index(), chunk = lane % kChunks, at = column + chunk * 8;
  uint4 values[2][kPasses] = {};
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = pass * kRowsPerPass + lane / kChunks;
    if (row >= rows || at >= columns) continue;
    values[0][pass] = *reinterpret_cast<const uint4*>(out + row * out_stride + at);
    values[1][pass] = *reinterpret_cast<const uint4*>(dout + row * dout_stride + at);
  }
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const uint32_t offset = Stage::Tile::offset(pass * kRowsPerPass + lane / kChunks, chunk);
    ptx::store_shared_16(shared + offset, values[0][pass]);
    ptx::store_shared_16(shared + Stage::kOutBytes + offset, values[1][pass]);
  }
}

// D and the LSE of 16 rows from `first_row` on, by one warp. D is the diagonal of O dO^T, which the tensor
// cores add up in the order in which the main kernel adds up dP^T = V dO^T. A row that sees one key has that
// key's value as its O: there D equals dP to the bit, and dS is exactly zero.
template <class Config>
__device__ __forceinline__ void prepare_rows(const BackwardParams& params, const Sequence& sequence,
                                             int batch, int head, int64_t first_row, uint32_t shared) {
  using Element = typename Config::Element;
  using Stage = PrepareStage<Config>;
  using Tile = typename Stage::Tile;
  const ForwardParams& forward = params.forward;
  const Element* out = sequence.out_rows<Element>(forward, head, first_row);
  const Element* dout =
      sequence.query_rows(static_cast<const Element*>(params.dout), params.dout_batch_stride,
                          params.dout_row_stride, params.dout_head_stride, head, first_row);
  const FragmentLane a = FragmentLane::of_a(), b = FragmentLane::of_b();
  const uint32_t out_address = shared + Tile::offset(a.row, a.chunk);
  const uint32_t dout_address = shared + Stage::kOutBytes + Tile::offset(b.row, b.chunk);
  float products[2][4] = {};
#pragma unroll
  for (int column = 0; column < Config::kHeadDim; column += Stage::kColumns) {
    __syncwarp();
    stage_rows<Config>(out, forward.out_row_stride, dout, params.dout_row_stride,
                       sequence.seqlen_q - first_row, forward.head_dim_v, column, shared);
    __syncwarp();
#pragma unroll
    for (int k = 0; k < Stage::kColumns / 16; ++k) {
      uint32_t of_out[4], of_dout[4];
      ptx::ldmatrix_x4(of_out, Tile::advance(out_address, 2 * k));
      ptx::ldmatrix_x4(of_dout, Tile::advance(dout_address, 2 * k));
      ptx::mma_m16n8k16<Config::kDtype>(products[0], of_out, of_dout[0], of_dout[1]);
      ptx::mma_m16n8k16<Config::kDtype>(products[1], of_out, of_dout[2], of_dout[3]);
    }
  }
  const int in_tile = threadIdx.x % 32 / 4;
  if (threadIdx.x % 4 != in_tile / 2) return;  // only these lanes hold a diagonal
  const int64_t workspace = workspace_row(params, batch, head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first_row + half * 8 + in_tile;
    const float lse = row < sequence.seqlen_q ? *sequence.lse_rows(forward, head, row) * kLog2E -
                                                    static_cast<float>(kProbsExponent<Config::kDtype>)
                                              : INFINITY;
    const float d = in_tile % 2 == 0 ? products[half][2 * half] : products[half][2 * half + 1];
    params.softmax_d[workspace + row] = d;
    if constexpr (kProbsExponent<Config::kDtype> != 0) {
      params.row_sums[workspace + row] = d / kProbsFactor<Config::kDtype>;
    }
    params.softmax_lse_log2[workspace + row] = lse;
    if (params.semaphores != nullptr) params.semaphores[workspace + row] = 0;
  }
}

template <class Config>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_kernel(const __grid_constant__ PrepareArguments arguments) {
  __shared__ __align__(128) uint8_t stages[kPrepareThreads / 32][PrepareStage<Config>::kBytes];
  static_assert(kPrepareThreads / 32 * PrepareStage<Config>::kRows == kWorkspaceRows, "a warp has 16 rows");
  const uint32_t shared = ptx::shared_address(stages[threadIdx.x / 32]);
  const BackwardParams& params = arguments.params;
  const int batch_head = blockIdx.x / arguments.tiles, tile = blockIdx.x % arguments.tiles;
  const int batch = batch_head / params.forward.num_heads, head = batch_head % params.forward.num_heads;
  const Sequence sequence(params.forward, batch);
  const int64_t end_row = padded_rows(params, batch);
  const int64_t step = int64_t{arguments.tiles} * kWorkspaceRows;
  for_each_tile(int64_t{tile} * kWorkspaceRows, step, end_row, [&](int row) {
    const int64_t first_row = row + threadIdx.x / 32 * PrepareStage<Config>::kRows;
    prepare_rows<Config>(params, sequence, batch, head, first_row, shared);
    if (params.dq == nullptr || row >= sequence.seqlen_q) return;
    auto* sums = reinterpret_cast<float4*>(params.dq_accumulator +
                                           (workspace_row(params, batch, head) + row) * Config::kHeadDim);
#pragma unroll 8
    for (int i = threadIdx.x; i < kWorkspaceRows * Config::kHeadDim / 4; i += kPrepareThreads) {
      sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  });
}

}  // namespace flash_attn::mma
