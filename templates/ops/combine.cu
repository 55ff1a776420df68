// O = sum of exp(LSE of the part - LSE) O of the part, LSE the logarithm of the sum of their exponentials. A
// part without visible keys has the LSE -inf and O = 0.
#include "ops/combine.h"

#include <cmath>
#include <cstdint>

#include "host/launch.h"
#include "problem/work.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/grid_dependency.cuh"
#include "warp/softmax.cuh"

namespace flash_attn {
namespace {

static_assert(kMaxSplits % 32 == 0, "each lane weighs as many parts");

struct CombineArguments {
  CacheParams params;
  int64_t rows;       // of all heads of all queries
  int warps_per_row;  // 1, or all of a block's
};

// Replaces the LSEs of a row's parts by their weights, in shared memory; returns the row's LSE.
__device__ __forceinline__ float weigh_parts(float* weights, const float* lse_partial, int num_splits) {
  const int lane = threadIdx.x % 32;
  float lse[kMaxSplits / 32], max = -INFINITY, sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) {
    const int part = i * 32 + lane;
    lse[i] = part < num_splits ? lse_partial[part] : -INFINITY;
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
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
  for (int i = 0; i < kMaxSplits / 32; ++i) weights[i * 32 + lane] = lse[i] * inverse;
  __syncwarp();
  return sum == 0.0f ? INFINITY : max + logf(sum);
}

// A warp's partial results of a row: every lane has four columns of each 128.
template <int kGroups>
class PartialRow {
 public:
  // The warp reads the parts `first`, `first` + `step`, ..
  __device__ __forceinline__ PartialRow(const float* row, int head_dim, int num_splits, int first, int step)
      : row_(row + threadIdx.x % 32 * 4),
        head_dim_(head_dim),
        num_splits_(num_splits),
        next_(first),
        step_(step) {
    load();
  }

  __device__ __forceinline__ bool done() const { return next_ >= num_splits_; }

  // Adds the batch that was read before to `o`, and reads the next one.
  __device__ __forceinline__ void add(float4 (&o)[kGroups], const float* weights) {
#pragma unroll
    for (int i = 0; i < kMergedAtOnce; ++i) {
      const int part = next_ + i * step_;
      const float weight = part < num_splits_ ? weights[part] : 0.0f;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float4& x = parts_[i][group];
        o[group] = make_float4(o[group].x + weight * x.x, o[group].y + weight * x.y,
                               o[group].z + weight * x.z, o[group].w + weight * x.w);
      }
    }
    next_ += kMergedAtOnce * step_;
    if (!done()) load();
  }

 private:
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kMergedAtOnce; ++i) {
      const int part = next_ + i * step_;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const bool exists = part < num_splits_ && group * 128 + threadIdx.x % 32 * 4 < head_dim_;
        parts_[i][group] = exists ? *reinterpret_cast<const float4*>(row_ + part * head_dim_ + group * 128)
                                  : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      }
    }
  }

  const float* row_;
  int head_dim_;
  int num_splits_;
  int next_;
  int step_;
  float4 parts_[kMergedAtOnce][kGroups];
};

// Where a row of the result lies.
template <class Element>
struct ResultRow {
  int head;
  Element* out;
  float* lse;

  __device__ __forceinline__ ResultRow(const ForwardParams& params, int64_t row) {
    const int64_t token = row / params.num_heads;
    head = static_cast<int>(row - token * params.num_heads);
    const int64_t batch = params.cu_seqlens_q == nullptr ? token / params.seqlen_q : 0;
    const int64_t query = token - batch * params.seqlen_q;
    out = static_cast<Element*>(params.out) + batch * params.out_batch_stride +
          query * params.out_row_stride + head * params.out_head_stride;
    lse = params.softmax_lse + batch * params.lse_batch_stride + head * params.lse_head_stride + query;
  }
};

// Adds up what the warps of a block have, in the first one.
template <int kGroups>
__device__ __forceinline__ void add_warps(float4 (&o)[kGroups],
                                          float4 (&shared)[kMergingWarps][kGroups][32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    shared[warp][group][lane] = o[group];
    __syncthreads();
    if (warp > 0) continue;
#pragma unroll
    for (int w = 1; w < kMergingWarps; ++w) {
      const float4 part = shared[w][group][lane];
      o[group] =
          make_float4(o[group].x + part.x, o[group].y + part.y, o[group].z + part.z, o[group].w + part.w);
    }
  }
}

// kGroups x 128 columns of O.
template <Dtype kDtype, int kGroups>
__global__ void __launch_bounds__(32 * kMergingWarps)
    combine_kernel(const __grid_constant__ CombineArguments arguments) {
  using Element = typename ptx::ElementOf<kDtype>::Type;
  __shared__ float weights[kMergingWarps][kMaxSplits];
  __shared__ float4 shared[kMergingWarps][kGroups][32];
  const CacheParams& params = arguments.params;
  const int head_dim = params.forward.head_dim_v, num_splits = params.num_splits;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps_per_row = arguments.warps_per_row;
  const int64_t row = int64_t{blockIdx.x} * (kMergingWarps / warps_per_row) + warp / warps_per_row;
  ptx::wait_for_dependency();
  if (row >= arguments.rows) return;

  PartialRow<kGroups> partials(params.out_partial + row * num_splits * head_dim, head_dim, num_splits,
                               warp % warps_per_row, warps_per_row);
  float lse = weigh_parts(weights[warp], params.lse_partial + row * num_splits, num_splits);
  float4 o[kGroups] = {};
  while (!partials.done()) partials.add(o, weights[warp]);
  if (warps_per_row > 1) {
    add_warps(o, shared);
    if (warp > 0) return;
  }
  const ResultRow<Element> result(params.forward, row);
  if (params.forward.sinks != nullptr) {
    const float factor = add_sink(lse, params.forward.sinks[result.head]);
#pragma unroll
    for (float4& part : o) {
      part = make_float4(factor * part.x, factor * part.y, factor * part.z, factor * part.w);
    }
  }
  if (lane == 0 && params.forward.softmax_lse != nullptr) *result.lse = lse;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int column = group * 128 + lane * 4;
    if (column >= head_dim) continue;
    *reinterpret_cast<uint2*>(result.out + column) =
        make_uint2(ptx::pack<kDtype>(o[group].x, o[group].y), ptx::pack<kDtype>(o[group].z, o[group].w));
  }
}

template <Dtype kDtype>
auto kernel_of(int head_dim) {
  return head_dim <= 128 ? combine_kernel<kDtype, 1> : combine_kernel<kDtype, 2>;
}

}  // namespace

Status launch_combine(const CacheParams& params, const Device& device, cudaStream_t stream) {
  const ForwardParams& forward = params.forward;
  const int64_t rows = forward.total_q * forward.num_heads;
  const int warps_per_row =
      merging_warps(static_cast<double>(rows), params.num_splits, device.multiprocessors);
  const CombineArguments arguments{params, rows, warps_per_row};
  const int rows_per_block = kMergingWarps / warps_per_row;
  const auto kernel = static_cast<Dtype>(forward.dtype) == Dtype::kBf16
                          ? kernel_of<Dtype::kBf16>(forward.head_dim_v)
                          : kernel_of<Dtype::kFp16>(forward.head_dim_v);
  static std::atomic<uint64_t> prepared;
  return launch_kernel(kernel, "combine", device.index, (rows + rows_per_block - 1) / rows_per_block,
                       32 * kMergingWarps, 0, stream, arguments, prepared, /*dependent*/ true);
}

}  // namespace flash_attn
