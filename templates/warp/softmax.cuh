// Online softmax in base 2 over the accumulator layout of mma.sync (FlashAttention-2, section 3.1; Milakov &
// Gimelshein 2018).
#pragma once

#include <cmath>

#include "problem/sequence.cuh"
#include "ptx/arithmetic.cuh"
#include "warp/accumulator.cuh"

namespace flash_attn {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Counts a score without a value, an attention sink, in a row's LSE; returns by what O must be multiplied. A
// row that sees no key stays as it is.
__device__ __forceinline__ float add_sink(float& lse, float sink) {
  if (isinf(lse)) return 1.0f;
  const float max = fmaxf(lse, sink);
  const float sum = max + logf(expf(lse - max) + expf(sink - max)), factor = expf(lse - sum);
  lse = sum;
  return factor;
}

// Sums that no other warp has a part of.
struct NoCombine {
  template <class Rows>
  __device__ __forceinline__ void operator()(Rows&) const {}
};

// A thread's rows: two for each m16 tile (lane / 4 and 8 below), spread over the four lanes of a quad.
template <int kTilesM>
struct OnlineSoftmax {
  static constexpr int kRows = 2 * kTilesM;

  // The running maximum may lag behind the true one by this much in log2 units, so that most blocks skip the
  // rescaling of O and of the sums. Probabilities then reach 2^8 at most, which fp16 and bf16 hold with the
  // same relative precision.
  static constexpr float kMaxLag = 8.0f;

  float max[kRows];  // in units of the raw scores
  float sum[kRows];  // this thread's part until `normalise`

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      max[row] = -INFINITY;
      sum[row] = 0.0f;
    }
  }

  // The rows' maxima over a block of scores.
  template <int kTilesN>
  __device__ static __forceinline__ void block_max(float (&result)[kRows],
                                                   const float (&scores)[kTilesM][kTilesN][4]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) result[row] = row_max(scores[row / 2], row % 2);
  }

  // Whether the running maximum of any row of this lane lags too far behind.
  __device__ __forceinline__ bool lags(const float (&block_max)[kRows], float scale) const {
    bool result = false;
#pragma unroll
    for (int row = 0; row < kRows; ++row) result |= (block_max[row] - max[row]) * scale > kMaxLag;
    return result;
  }

  // Brings the running maximum up to date; the sums follow, and O is to be multiplied by `factor`.
  __device__ __forceinline__ void advance(float (&factor)[kRows], const float (&block_max)[kRows],
                                          float scale) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float new_max = fmaxf(max[row], block_max[row]);
      factor[row] = new_max == -INFINITY ? 1.0f : ptx::exp2_approx((max[row] - new_max) * scale);
      max[row] = new_max;
      sum[row] *= factor[row];
    }
  }

  // Multiplies each row of O by its factor.
  template <int kOutputTiles>
  __device__ static __forceinline__ void rescale(float (&output)[kTilesM][kOutputTiles][4],
                                                 const float (&factor)[kRows]) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int n = 0; n < kOutputTiles; ++n) {
        output[row / 2][n][2 * (row % 2)] *= factor[row];
        output[row / 2][n][2 * (row % 2) + 1] *= factor[row];
      }
    }
  }

  // Replaces `scores` by exp2(scale * (score - max)) and adds them up.
  template <int kTilesN>
  __device__ __forceinline__ void exponentiate(float (&scores)[kTilesM][kTilesN][4], float scale) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float scaled_max = max[row] == -INFINITY ? 0.0f : max[row] * scale;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 2 * (row % 2); c < 2 * (row % 2) + 2; ++c) {
          float& score = scores[row / 2][n][c];
          score = ptx::exp2_approx(fmaf(score, scale, -scaled_max));
          sum[row] += score;
        }
      }
    }
  }

  // Completes the sums over the quad and, with `combine`, over other warps. Returns for each row 1 / sum, or
  // 0 for a row that saw no key.
  template <class Combine = NoCombine>
  __device__ __forceinline__ void normalise(float (&inverse_sum)[kRows], Combine combine = {}) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      sum[row] += __shfl_xor_sync(0xffffffff, sum[row], 1);
      sum[row] += __shfl_xor_sync(0xffffffff, sum[row], 2);
    }
    combine(sum);
#pragma unroll
    for (int row = 0; row < kRows; ++row) inverse_sum[row] = sum[row] == 0.0f ? 0.0f : 1.0f / sum[row];
  }

  // Natural logarithm of the row's sum of exponentials; +inf for a row that saw no key. Call after
  // `normalise`.
  __device__ __forceinline__ float log_sum_exp(int row, float scale) const {
    return sum[row] == 0.0f ? INFINITY : max[row] * scale * kLn2 + logf(sum[row]);
  }

 private:
  template <int kTilesN>
  __device__ static __forceinline__ float row_max(const float (&scores)[kTilesN][4], int half) {
    float result = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < kTilesN; ++n) {
      result = fmaxf(result, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    result = fmaxf(result, __shfl_xor_sync(0xffffffff, result, 1));
    return fmaxf(result, __shfl_xor_sync(0xffffffff, result, 2));
  }
};

// Completes an attention kernel's rows from `first_row` of the block of queries on: stores their LSE, sinks
// counted, and makes `factor`, 1 / sum, what O is to be multiplied by.
template <class Scores, int kTilesM>
__device__ __forceinline__ void complete_rows(float (&factor)[2 * kTilesM],
                                              const OnlineSoftmax<kTilesM>& softmax, const Scores& policy,
                                              const QueryBlock& queries, int first_row, bool stores = true) {
  const ForwardParams& params = *queries.params;
  stores = stores && params.softmax_lse != nullptr && lane_index() % 4 == 0;
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = first_row + fragment_row(i);
    float lse = softmax.log_sum_exp(i, policy.exponent_scale());
    if (params.sinks != nullptr) factor[i] *= add_sink(lse, params.sinks[queries.head_of(row)]);
    factor[i] *= policy.output_factor();
    if (stores && row < queries.rows) *queries.lse(row) = lse;
  }
}

}  // namespace flash_attn
