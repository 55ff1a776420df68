// S_dmask: softmax(scores) with the sign bit set where dropout has dropped the entry, padded with zeros to
// multiples of kProbsBlock.
//
// For inspection and tests. It recomputes every score on its own from q, k and the LSE, so that the attention
// kernels need not be able to write probabilities.
#include "ops/dropout_probs.h"

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "host/launch.h"
#include "problem/mask.cuh"
#include "problem/sequence.cuh"
#include "ptx/arithmetic.cuh"
#include "warp/dropout.cuh"
#include "warp/scores.cuh"

namespace flash_attn {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;

struct DropoutProbsArguments {
  ForwardParams params;
  int rows;     // padded seqlen_q
  int columns;  // padded seqlen_k
};

template <class Element>
__device__ float dot(const Element* q, const Element* k, int head_dim) {
  float sum = 0.0f;
  for (int i = 0; i < head_dim; ++i) sum = fmaf(static_cast<float>(q[i]), static_cast<float>(k[i]), sum);
  return sum;
}

template <class Element>
__device__ float signed_probability(const ForwardParams& params, int batch, int head, int row, int column) {
  const Sequence sequence(params, batch);
  if (row >= sequence.seqlen_q || column >= sequence.seqlen_k) return 0.0f;
  const AttentionMask<Mask::kWindowed> mask(params, sequence.seqlen_q, sequence.seqlen_k);
  float probability = 0.0f;
  if (column >= mask.first_key(row) && column < mask.end_key(row)) {
    const int key_head = head / (params.num_heads / params.num_heads_k);
    const Element* q = sequence.q_rows<Element>(params, head, row);
    const Element* k = sequence.k_rows<Element>(params, key_head) + column * params.k_row_stride;
    const float lse = *sequence.lse_rows(params, head, row);
    const ScoreModifiers modifiers(params, batch, head);
    const float score =
        modifiers.scale(dot(q, k, params.head_dim)) - modifiers.bias(row + mask.diagonal - column);
    probability = exp2f(score - lse * kLog2E);
  }
  const Dropout dropout(params, batch * params.num_heads + head);
  const int lane = row % 8 * 4 + column % 8 / 2;
  const uint4 words = dropout.words(row / 16, column / 16, lane);
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
  return dropout.keeps(word[column / 8 % 2 * 2 + row / 8 % 2], column % 2) ? probability : -probability;
}

template <class Element>
__global__ void __launch_bounds__(kThreads)
    dropout_probs_kernel(const __grid_constant__ DropoutProbsArguments arguments) {
  const ForwardParams& params = arguments.params;
  const int64_t per_head = static_cast<int64_t>(arguments.rows) * arguments.columns;
  const int64_t total = per_head * params.batch * params.num_heads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t batch_head = i / per_head;
    const int row = static_cast<int>(i % per_head / arguments.columns);
    const int column = static_cast<int>(i % arguments.columns);
    static_cast<Element*>(params.probs)[i] = static_cast<Element>(signed_probability<Element>(
        params, batch_head / params.num_heads, batch_head % params.num_heads, row, column));
  }
}

template <class Element>
Status launch(const DropoutProbsArguments& arguments, cudaStream_t stream) {
  static std::atomic<uint64_t> prepared;
  const ForwardParams& params = arguments.params;
  const int64_t elements =
      static_cast<int64_t>(arguments.rows) * arguments.columns * params.batch * params.num_heads;
  const int64_t blocks = std::min((elements + kThreads - 1) / kThreads, kMaxBlocks);
  return launch_kernel(dropout_probs_kernel<Element>, "dropout_probs", params.device, blocks, kThreads, 0,
                       stream, arguments, prepared);
}

}  // namespace

Status launch_dropout_probs(const ForwardParams& params, cudaStream_t stream) {
  const auto padded = [](int length) { return (length + kProbsBlock - 1) / kProbsBlock * kProbsBlock; };
  const DropoutProbsArguments arguments{params, padded(params.seqlen_q), padded(params.seqlen_k)};
  return static_cast<Dtype>(params.dtype) == Dtype::kBf16 ? launch<__nv_bfloat16>(arguments, stream)
                                                          : launch<__half>(arguments, stream);
}

}  // namespace flash_attn
