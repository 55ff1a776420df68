// The workspace of a backward call: for each head the rows of all sequences, each sequence padded so that
// whole tiles of queries may be read and written.
#pragma once

#include <cstdint>

#include "abi.h"

namespace flash_attn::mma {

// The backward multiplies P by this power of two before it rounds it: below 2^-14 fp16 has fewer digits, and
// dK and dV of a key that all queries see weakly would have no more of them. P is at most 1. dS has no bound
// and is rounded without the factor.
template <Dtype kDtype>
constexpr int kProbsExponent = kDtype == Dtype::kFp16 ? 10 : 0;
template <Dtype kDtype>
constexpr float kProbsFactor = static_cast<float>(1 << kProbsExponent<kDtype>);

// Row at which the queries of `batch` and `head` start.
__device__ __forceinline__ int64_t workspace_row(const BackwardParams& params, int batch, int head) {
  const ForwardParams& forward = params.forward;
  if (forward.cu_seqlens_q == nullptr) {
    return (int64_t{batch} * forward.num_heads + head) * params.rows;
  }
  const int64_t row = forward.cu_seqlens_q[batch] + int64_t{kWorkspaceRows} * batch;
  return head * params.rows + row / kWorkspaceRows * kWorkspaceRows;
}

// The same for the keys of a head of K, whose partial gradients lie in the workspace if there are several
// parts.
__device__ __forceinline__ int64_t workspace_key_row(const BackwardParams& params, int batch, int key_head) {
  const ForwardParams& forward = params.forward;
  if (forward.cu_seqlens_k == nullptr) {
    return (int64_t{batch} * forward.num_heads_k + key_head) * params.key_rows;
  }
  const int64_t row = forward.cu_seqlens_k[batch] + int64_t{kWorkspaceRows} * batch;
  return key_head * params.key_rows + row / kWorkspaceRows * kWorkspaceRows;
}

// A piece of dQ in the workspace: the four elements that each lane of a warp holds of a 16x8 accumulator
// tile, laid out so that adding them is one instruction of 512 consecutive bytes, or four of 128.
struct GradientFragment {
  static constexpr int kFloats = 128;
#if __CUDA_ARCH__ >= 900
  static constexpr int kLaneStride = 4;
  static constexpr int kElementStride = 1;
#else
  static constexpr int kLaneStride = 1;
  static constexpr int kElementStride = 32;
#endif
};

}  // namespace flash_attn::mma
