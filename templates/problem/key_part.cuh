// Rows of queries over one of several parts of their keys; ops/combine.cu merges the results.
#pragma once

#include <cmath>
#include <cstdint>

#include "abi.h"
#include "problem/query_block.cuh"

namespace flash_attn {

struct SplitWork {
  QueryBlock queries;
  int split;
  int num_splits;

  // Where row i of a partial result goes: O in fp32, and its LSE.
  __device__ __forceinline__ int64_t partial(int i) const { return queries.index(i) * num_splits + split; }
};

// Rows that see no key in this split: O = 0, and LSE = -inf unless it is the only split. Threads
// 0 .. threads - 1 share the work; `thread` is this one.
template <class Element>
__device__ __forceinline__ void store_no_keys(const CacheParams& params, const SplitWork& work, int thread,
                                              int threads) {
  if (work.num_splits == 1) return store_empty<Element>(work.queries, thread, threads);
  const int chunks = params.forward.head_dim_v / 4;
#pragma unroll 1
  for (int i = thread; i < work.queries.rows * chunks; i += threads) {
    const int64_t at = work.partial(i / chunks);
    reinterpret_cast<float4*>(params.out_partial)[at * chunks + i % chunks] = make_float4(0, 0, 0, 0);
    if (i % chunks == 0) params.lse_partial[at] = -INFINITY;
  }
}

}  // namespace flash_attn
