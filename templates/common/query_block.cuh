// The queries that a thread block computes, and the result of those that see no key.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/sequence.cuh"

namespace flash_attn {

// The queries [first_row, first_row + rows) of one head of one sequence.
struct QueryBlock {
  const ForwardParams* params;
  Sequence sequence;
  int batch;
  int head;
  int first_row;
  int rows;

  template <class Element>
  __device__ __forceinline__ const Element* query() const {
    return sequence.q_rows<Element>(*params, head, first_row);
  }
  template <class Element>
  __device__ __forceinline__ Element* out() const {
    return sequence.out_rows<Element>(*params, head, first_row);
  }
  __device__ __forceinline__ float* lse() const { return sequence.lse_rows(*params, head, first_row); }
};

// Queries that see no key: O = 0, LSE = +inf. Threads 0 .. threads - 1 share the work; `thread` is this one.
template <class Element>
__device__ __forceinline__ void store_empty(const QueryBlock& queries, int thread, int threads) {
  const int chunks = queries.params->head_dim_v / 8;
  auto* out = queries.out<Element>();
  for (int i = thread; i < queries.rows * chunks; i += threads) {
    *reinterpret_cast<uint4*>(out + i / chunks * queries.params->out_row_stride + i % chunks * 8) =
        make_uint4(0, 0, 0, 0);
  }
  if (queries.params->softmax_lse == nullptr) return;
  for (int row = thread; row < queries.rows; row += threads) queries.lse()[row] = INFINITY;
}

}  // namespace flash_attn
