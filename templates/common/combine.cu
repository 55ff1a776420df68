// O = sum of exp(LSE of the split - LSE) O of the split, LSE the logarithm of the sum of their exponentials.
// A split without visible keys has the LSE -inf and no O.
#include "common/combine.h"

#include <cmath>
#include <cstdint>

#include "common/dtype.cuh"
#include "common/softmax.cuh"
#include "host/launch.h"
#include "ptx/grid_dependency.cuh"
#include "ptx/math.cuh"

namespace flash_attn {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxSplits = 128;

struct CombineArguments {
  SplitParams params;
  int64_t rows;       // of all heads of all queries
  int warps_per_row;  // 1, or all of a block's
};

// Replaces the LSEs of a row's splits by their weights, in shared memory; returns the row's LSE.
__device__ __forceinline__ float weigh_splits(float* weights, const float* lse_partial, int num_splits) {
  const int lane = threadIdx.x % 32;
  float lse[kMaxSplits / 32], max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    const int split = i * 32 + lane;
    lse[i] = split < num_splits ? lse_partial[split] : -INFINITY;
    max = fmaxf(max, lse[i]);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, step));
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    lse[i] = max == -INFINITY ? 0.0f : ptx::exp2_approx((lse[i] - max) * kLog2E);
    sum += lse[i];
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) weights[i * 32 + lane] = sum == 0.0f ? 0.0f : lse[i] / sum;
  __syncwarp();
  return sum == 0.0f ? INFINITY : max + logf(sum);
}

// This lane's columns of the weighted sum over the splits `first`, `first` + `step`, ..
__device__ __forceinline__ void sum_splits(float4 (&o)[2], const float* weights, const float* out_partial,
                                           int head_dim, int num_splits, int first, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll 8
  for (int split = first; split < num_splits; split += step) {
    const float weight = weights[split];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = half * 128 + lane * 4;
      if (column >= head_dim || weight == 0.0f) continue;
      const float4 part = *reinterpret_cast<const float4*>(out_partial + int64_t{split} * head_dim + column);
      o[half].x += weight * part.x;
      o[half].y += weight * part.y;
      o[half].z += weight * part.z;
      o[half].w += weight * part.w;
    }
  }
}

// Where a row of the result lies.
template <class Element>
struct ResultRow {
  Element* out;
  float* lse;

  __device__ __forceinline__ ResultRow(const ForwardParams& params, int64_t row) {
    const int64_t token = row / params.num_heads;
    const int head = static_cast<int>(row - token * params.num_heads);
    const int64_t batch = params.cu_seqlens_q == nullptr ? token / params.seqlen_q : 0;
    const int64_t query = token - batch * params.seqlen_q;
    out = static_cast<Element*>(params.out) + batch * params.out_batch_stride +
          query * params.out_row_stride + head * params.out_head_stride;
    lse = params.softmax_lse + batch * params.lse_batch_stride + head * params.lse_head_stride + query;
  }
};

template <Dtype kDtype>
__global__ void __launch_bounds__(32 * kWarps)
    combine_kernel(const __grid_constant__ CombineArguments arguments) {
  using Element = typename ElementOf<kDtype>::Type;
  __shared__ float weights[kWarps][kMaxSplits];
  __shared__ float4 parts[kWarps][2][32];
  const SplitParams& params = arguments.params;
  const int head_dim = params.forward.head_dim_v;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rows_per_block = kWarps / arguments.warps_per_row, in_row = warp % arguments.warps_per_row;
  const int64_t row = int64_t{blockIdx.x} * rows_per_block + warp / arguments.warps_per_row;
  ptx::wait_for_dependency();
  float4 o[2] = {};
  float lse = 0.0f;
  if (row < arguments.rows) {
    lse = weigh_splits(weights[warp], params.lse_partial + row * params.num_splits, params.num_splits);
    sum_splits(o, weights[warp], params.out_partial + row * params.num_splits * head_dim, head_dim,
               params.num_splits, in_row, arguments.warps_per_row);
  }
  if (arguments.warps_per_row > 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) parts[warp][half][lane] = o[half];
    __syncthreads();
    if (warp > 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const float4 part = parts[w][half][lane];
        o[half] = make_float4(o[half].x + part.x, o[half].y + part.y, o[half].z + part.z, o[half].w + part.w);
      }
    }
  }
  if (row >= arguments.rows) return;
  const ResultRow<Element> result(params.forward, row);
  if (lane == 0 && params.forward.softmax_lse != nullptr) *result.lse = lse;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = half * 128 + lane * 4;
    if (column >= head_dim) continue;
    *reinterpret_cast<uint2*>(result.out + column) =
        make_uint2(pack<kDtype>(o[half].x, o[half].y), pack<kDtype>(o[half].z, o[half].w));
  }
}

}  // namespace

Status launch_combine(const SplitParams& params, const Device& device, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int warps_per_row = params.num_splits >= 2 * kWarps ? kWarps : 1;
  const CombineArguments arguments{params, forward.total_q * forward.num_heads, warps_per_row};
  const int rows_per_block = kWarps / warps_per_row;
  static std::atomic<uint64_t> prepared;
  return launch_kernel(static_cast<Dtype>(forward.dtype) == Dtype::kBf16 ? combine_kernel<Dtype::kBf16>
                                                                         : combine_kernel<Dtype::kFp16>,
                       "combine", device.index, (arguments.rows + rows_per_block - 1) / rows_per_block,
                       32 * kWarps, 0, stream, arguments, prepared, has_grid_dependencies(device));
}

}  // namespace flash_attn
