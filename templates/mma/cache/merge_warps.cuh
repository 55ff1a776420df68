// Merging what the warps of a thread block have of the same rows over different keys, and writing the result.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "problem/work.cuh"
#include "ptx/arithmetic.cuh"
#include "warp/accumulator.cuh"
#include "warp/softmax.cuh"

namespace flash_attn::mma {

__device__ __forceinline__ void scale(float4 (&o)[4], float factor) {
#pragma unroll
  for (float4& part : o) {
    part = make_float4(part.x * factor, part.y * factor, part.z * factor, part.w * factor);
  }
}

// The maximum, the sum and O of every row and every warp that has keys of it, in shared memory.
template <class Config>
class WarpResults {
 public:
  static constexpr int kColumnStep = Config::kHeadDim / 4;

  __device__ __forceinline__ explicit WarpResults(uint8_t* shared)
      : output_(reinterpret_cast<float*>(shared)),
        max_(output_ + Config::kWarpsN * Config::kBlockM * Config::kOutputStride),
        sum_(max_ + Config::kWarpsN * Config::kBlockM) {}

  __device__ __forceinline__ void write(const Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                        const OnlineSoftmax<Config::kTilesM>& softmax, int key_warp,
                                        int first_row) {
#pragma unroll
    for (int i = 0; i < 2 * Config::kTilesM; ++i) {
      const int row = key_warp * Config::kBlockM + first_row + fragment_row(i);
      if (lane_index() % 4 == 0) max_[row] = softmax.max[i], sum_[row] = softmax.sum[i];
#pragma unroll
      for (int n = 0; n < Config::kTilesD; ++n) {
        const float* o = output[i / 2][n] + 2 * (i % 2);
        *reinterpret_cast<float2*>(output_ + row * Config::kOutputStride + n * 8 + fragment_column()) =
            make_float2(o[0], o[1]);
      }
    }
  }

  // Adds up every kColumnStep-th four columns of O of a row from `column` on, normalised; returns the row's
  // LSE, -inf if it saw no key.
  __device__ __forceinline__ float merge(float4 (&o)[4], int row, int column, float scale_log2) const {
    float max = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Config::kWarpsN; ++w) max = fmaxf(max, max_[w * Config::kBlockM + row]);
#pragma unroll
    for (float4& part : o) part = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (max == -INFINITY) return max;
#pragma unroll
    for (int w = 0; w < Config::kWarpsN; ++w) {
      const int at = w * Config::kBlockM + row;
      const float factor = ptx::exp2_approx((max_[at] - max) * scale_log2);
      sum += factor * sum_[at];
      const float* parts = output_ + at * Config::kOutputStride + column;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float4 part = *reinterpret_cast<const float4*>(parts + i * kColumnStep);
        o[i] = make_float4(o[i].x + factor * part.x, o[i].y + factor * part.y, o[i].z + factor * part.z,
                           o[i].w + factor * part.w);
      }
    }
    scale(o, 1.0f / sum);
    return max * scale_log2 * kLn2 + logf(sum);
  }

 private:
  float* output_;
  float* max_;
  float* sum_;
};

// Writes the merged rows: the result, or this part's share of it. A thread has 16 columns of a row.
template <class Config>
__device__ __forceinline__ void store_merged(const CacheParams& params, const QueryBlock& queries,
                                             const KeyPart& part, const WarpResults<Config>& results,
                                             float scale_log2) {
  constexpr int kThreadsPerRow = Config::kHeadDim / 16, kStep = WarpResults<Config>::kColumnStep;
  const ForwardParams& forward = params.forward;
#pragma unroll 1
  for (int i = threadIdx.x; i < queries.rows * kThreadsPerRow; i += Config::kThreads) {
    const int row = i / kThreadsPerRow, column = i % kThreadsPerRow * 4;
    float4 o[4];
    float lse = results.merge(o, row, column, scale_log2);
    if (part.count > 1) {
      const int64_t at = part.partial_row(queries, row);
      float* out = params.out_partial + at * forward.head_dim_v;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int first = column + j * kStep;
        if (first < forward.head_dim_v) *reinterpret_cast<float4*>(out + first) = o[j];
      }
      if (column == 0) params.lse_partial[at] = lse;
    } else {
      if (forward.sinks != nullptr) scale(o, add_sink(lse, forward.sinks[queries.head_of(row)]));
      auto* out = queries.out<typename Config::Element>(row);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int first = column + j * kStep;
        const uint2 packed = {ptx::pack<Config::kDtype>(o[j].x, o[j].y),
                              ptx::pack<Config::kDtype>(o[j].z, o[j].w)};
        if (first < forward.head_dim_v) *reinterpret_cast<uint2*>(out + first) = packed;
      }
      if (column == 0 && forward.softmax_lse != nullptr)
        *queries.lse(row) = lse == -INFINITY ? INFINITY : lse;
    }
  }
}

}  // namespace flash_attn::mma
