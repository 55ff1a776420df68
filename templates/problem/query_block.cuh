// The queries that a thread block computes, and the result of those that see no key.
#pragma once

#include <cmath>
#include <cstdint>

#include "problem/sequence.cuh"

namespace flash_attn {

// The rows [first_row, first_row + rows) of one head of one sequence. Where `group` query heads that share
// keys are packed, row i is query i / group of head `head` * group + i % group.
struct QueryBlock {
  const ForwardParams* params;
  Sequence sequence;
  int batch;
  int head;
  int group;
  int first_row;
  int rows;

  template <class Element>
  __device__ __forceinline__ const Element* query() const {
    return sequence.q_rows<Element>(*params, head, first_row);
  }
  template <class Element>
  __device__ __forceinline__ const Element* query(int i) const {
    const int row = query_of(i);
    return sequence.q_rows<Element>(*params, head_of(i, row), row);
  }

  template <class Element>
  __device__ __forceinline__ Element* out(int i) const {
    const int row = query_of(i);
    return sequence.out_rows<Element>(*params, head_of(i, row), row);
  }
  __device__ __forceinline__ float* lse(int i) const {
    const int row = query_of(i);
    return sequence.lse_rows(*params, head_of(i, row), row);
  }

  // Number of row i among the rows of all heads of all queries, heads running fastest.
  __device__ __forceinline__ int64_t index(int i) const {
    const int row = query_of(i);
    const int64_t token = int64_t{sequence.q_batch} * params->seqlen_q + sequence.q_row + row;
    return token * params->num_heads + head_of(i, row);
  }

  __device__ __forceinline__ int head_of(int i) const { return head_of(i, query_of(i)); }

 private:
  __device__ __forceinline__ int query_of(int i) const { return (first_row + i) / group; }
  __device__ __forceinline__ int head_of(int i, int row) const {
    return head * group + first_row + i - row * group;
  }
};

// Queries that see no key: O = 0, LSE = +inf. Threads 0 .. threads - 1 share the work; `thread` is this one.
template <class Element>
__device__ __forceinline__ void store_empty(const QueryBlock& queries, int thread, int threads) {
  const int chunks = queries.params->head_dim_v / 8;
#pragma unroll 1
  for (int i = thread; i < queries.rows * chunks; i += threads) {
    *reinterpret_cast<uint4*>(queries.out<Element>(i / chunks) + i % chunks * 8) = make_uint4(0, 0, 0, 0);
  }
  if (queries.params->softmax_lse == nullptr) return;
#pragma unroll 1
  for (int row = thread; row < queries.rows; row += threads) *queries.lse(row) = INFINITY;
}

}  // namespace flash_attn
