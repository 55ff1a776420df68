// The epilogue: completes the sums, writes LSE and the normalised O straight from registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem/key_part.cuh"
#include "problem/query_block.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"
#include "wgmma/forward/config.cuh"

namespace flash_attn::wgmma {

// Transposes a 4x4 matrix of which each lane of a quad holds a row.
__device__ __forceinline__ void transpose_quad(uint32_t (&row)[4]) {
  const bool odd = threadIdx.x % 2, high = threadIdx.x / 2 % 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? row[i] : row[i + 1], 1);
    (odd ? row[i] : row[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, high ? row[i] : row[i + 2], 2);
    (high ? row[i] : row[i + 2]) = other;
  }
}

// Writes O, each row times its `factor`. A quad transposes four tiles of 8 columns, so that each lane stores
// 16 bytes.
template <class Config>
__device__ __forceinline__ void store_output(const QueryBlock& queries, int first_row,
                                             const Accumulator<1, Config::kTilesD>& output,
                                             const float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + i * 8 + lane / 4;
    auto* out = queries.out<typename Config::Element>(row);
#pragma unroll
    for (int n = 0; n < Config::kTilesD; n += 4) {
      uint32_t chunk[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* o = output[0][n + j] + 2 * i;
        chunk[j] = pack<Config::kDtype>(o[0] * factor[i], o[1] * factor[i]);
      }
      transpose_quad(chunk);
      const int column = (n + lane % 4) * 8;
      if (row < queries.rows && column < queries.params->head_dim_v) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
      }
    }
  }
}

template <class Config, bool kModifiers>
__device__ __forceinline__ void finish(const QueryBlock& queries, OnlineSoftmax<1>& softmax,
                                       const Accumulator<1, Config::kTilesD>& output, float scale_log2) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16;
  float factor[2];
  softmax.finish(factor, [](float (&)[2]) {});
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + i * 8 + lane / 4;
    float lse = softmax.log_sum_exp(i, scale_log2);
    if (queries.params->sinks != nullptr) {
      factor[i] *= add_sink(lse, queries.params->sinks[queries.head_of(row)]);
    }
    if (queries.params->softmax_lse != nullptr && lane % 4 == 0 && row < queries.rows) {
      *queries.lse(row) = lse;
    }
    if constexpr (kModifiers) factor[i] *= queries.params->dropout_rescale;
  }
  store_output<Config>(queries, first_row, output, factor);
}

// This split's part of a result.
template <class Config>
__device__ __forceinline__ void finish_part(const CacheParams& params, const SplitWork& work,
                                            OnlineSoftmax<1>& softmax,
                                            const Accumulator<1, Config::kTilesD>& output, float scale_log2) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x % 128 / 32 * 16;
  const int head_dim_v = params.forward.head_dim_v;
  float factor[2];
  softmax.finish(factor, [](float (&)[2]) {});
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + i * 8 + lane / 4;
    if (row >= work.queries.rows) continue;
    const int64_t at = work.partial(row);
    if (lane % 4 == 0) {
      params.lse_partial[at] = factor[i] == 0.0f ? -INFINITY : softmax.log_sum_exp(i, scale_log2);
    }
    float* out = params.out_partial + at * head_dim_v;
#pragma unroll
    for (int n = 0; n < Config::kTilesD; ++n) {
      const float* o = output[0][n] + 2 * i;
      const int column = n * 8 + lane % 4 * 2;
      if (column < head_dim_v) {
        *reinterpret_cast<float2*>(out + column) = make_float2(o[0] * factor[i], o[1] * factor[i]);
      }
    }
  }
}

}  // namespace flash_attn::wgmma
