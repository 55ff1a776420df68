// The epilogue of a consumer warpgroup: completes the sums, writes LSE and O straight from registers.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem/sequence.cuh"
#include "problem/work.cuh"
#include "ptx/arithmetic.cuh"
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
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + fragment_row(i);
    auto* out = queries.out<typename Config::Element>(row);
#pragma unroll
    for (int n = 0; n < Config::kTilesD; n += 4) {
      uint32_t chunk[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* o = output[0][n + j] + 2 * i;
        chunk[j] = ptx::pack<Config::kDtype>(o[0] * factor[i], o[1] * factor[i]);
      }
      transpose_quad(chunk);
      const int column = (n + lane % 4) * 8;
      if (row < queries.rows && column < queries.params->head_dim_v) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
      }
    }
  }
}

// The rows of a warpgroup that has all of their keys.
template <class Config, class Scores>
__device__ __forceinline__ void store_rows(const QueryBlock& queries, const Scores& policy,
                                           OnlineSoftmax<1>& softmax,
                                           const Accumulator<1, Config::kTilesD>& output) {
  const int first_row = threadIdx.x % 128 / 32 * 16;
  float factor[2];
  softmax.normalise(factor);
  complete_rows(factor, softmax, policy, queries, first_row);
  store_output<Config>(queries, first_row, output, factor);
}

// The rows of a warpgroup that has one part of their keys: partial O and LSE.
template <class Config, class Scores>
__device__ __forceinline__ void store_partial_rows(const CacheParams& params, const QueryBlock& queries,
                                                   const KeyPart& part, const Scores& policy,
                                                   OnlineSoftmax<1>& softmax,
                                                   const Accumulator<1, Config::kTilesD>& output) {
  const int first_row = threadIdx.x % 128 / 32 * 16;
  const int head_dim_v = params.forward.head_dim_v;
  float factor[2];
  softmax.normalise(factor);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + fragment_row(i);
    if (row >= queries.rows) continue;
    const int64_t at = part.partial_row(queries, row);
    if (lane_index() % 4 == 0) {
      params.lse_partial[at] =
          factor[i] == 0.0f ? -INFINITY : softmax.log_sum_exp(i, policy.exponent_scale());
    }
    float* out = params.out_partial + at * head_dim_v;
#pragma unroll
    for (int n = 0; n < Config::kTilesD; ++n) {
      const float* o = output[0][n] + 2 * i;
      const int column = n * 8 + fragment_column();
      if (column < head_dim_v) {
        *reinterpret_cast<float2*>(out + column) = make_float2(o[0] * factor[i], o[1] * factor[i]);
      }
    }
  }
}

}  // namespace flash_attn::wgmma
