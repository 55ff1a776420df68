// What a thread block of the backward kernel computes, its copies to shared memory, and where each warp
// works.
#pragma once

#include <cstdint>

#include "mma/backward/config.cuh"
#include "mma/backward/workspace.cuh"
#include "mma/products.cuh"
#include "problem/mask.cuh"
#include "problem/sequence.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

// A block of queries of one head.
struct QueryStep {
  int head;
  int block;
};

// What a thread block computes: a block of keys of one head, and the queries that see any of them, of one
// part of the heads that share these keys.
template <class Config>
struct KeyTile {
  using Element = typename Config::Element;
  const BackwardParams& params;
  Sequence sequence;
  AttentionMask<Config::kMask> mask;
  int batch;
  int head;  // of K, times the number of parts, plus the part
  int block;
  int first_step;  // blocks of queries [first_step, end_step) of each head of Q
  int end_step;

  __device__ __forceinline__ KeyTile(const BackwardParams& params, const Sequence& sequence, int batch,
                                     int head, int block)
      : params(params),
        sequence(sequence),
        mask(params.forward, sequence.seqlen_q, sequence.seqlen_k),
        batch(batch),
        head(head),
        block(block) {
    const int last_key = min(first_key() + Config::kBlockN, sequence.seqlen_k) - 1;
    first_step = mask.first_query(first_key()) / Config::kBlockM;
    end_step = (max(mask.end_query(last_key, sequence.seqlen_q), 0) + Config::kBlockM - 1) / Config::kBlockM;
  }

  __device__ __forceinline__ int first_key() const { return block * Config::kBlockN; }
  __device__ __forceinline__ int keys() const { return sequence.seqlen_k - first_key(); }
  __device__ __forceinline__ int key_head() const { return head / params.key_parts; }
  __device__ __forceinline__ int group() const {
    return params.forward.num_heads / (params.forward.num_heads_k * params.key_parts);
  }
  __device__ __forceinline__ int steps() const { return max(end_step - first_step, 0) * group(); }
  __device__ __forceinline__ QueryStep first() const { return {head * group(), first_step}; }
  __device__ __forceinline__ bool is_first(QueryStep step) const {
    return step.block == first_step && step.head == head * group();
  }
  __device__ __forceinline__ QueryStep next(QueryStep step) const {
    return step.block + 1 < end_step ? QueryStep{step.head, step.block + 1}
                                     : QueryStep{step.head + 1, first_step};
  }
  __device__ __forceinline__ QueryStep previous(QueryStep step) const {
    return step.block > first_step ? QueryStep{step.head, step.block - 1}
                                   : QueryStep{step.head - 1, end_step - 1};
  }

  // The blocks of keys that a step's queries see.
  __device__ __forceinline__ KeyBlocks<Config::kMask, Config::kBlockN> visible(QueryStep step) const {
    const int row = step.block * Config::kBlockM;
    return {mask, row, min(row + Config::kBlockM, sequence.seqlen_q) - 1};
  }

  // How many blocks of keys add to a step's dQ before this one, where they take turns: those behind it.
  __device__ __forceinline__ int turn(QueryStep step) const { return visible(step).end - 1 - block; }

  // Row of the workspace at which a step's tile starts.
  __device__ __forceinline__ int64_t workspace(QueryStep step) const {
    return workspace_row(params, batch, step.head) + step.block * Config::kBlockM;
  }
};

template <class Config>
__device__ __forceinline__ void load_keys(const KeyTile<Config>& keys, uint32_t shared) {
  using Element = typename Config::Element;
  using Copy = TileCopy<Element, Config::kBlockN, Config::kHeadDim, Config::kThreads>;
  const ForwardParams& params = keys.params.forward;
  Copy k(shared, keys.sequence.template k_rows<Element>(params, keys.key_head()), params.k_row_stride);
  k.move(keys.block, params.k_row_stride);
  k.issue(params.k_row_stride, keys.keys(), params.head_dim);
  Copy v(shared + Config::kKeyBytes, keys.sequence.template v_rows<Element>(params, keys.key_head()),
         params.v_row_stride);
  v.move(keys.block, params.v_row_stride);
  v.issue(params.v_row_stride, keys.keys(), params.head_dim_v);
  ptx::cp_async_commit();
}

// Starts the copies of a step's Q, dO, LSE and D into `stage`.
template <class Config>
__device__ __forceinline__ void load_step(const KeyTile<Config>& keys, QueryStep step, uint32_t shared,
                                          int stage) {
  using Element = typename Config::Element;
  using Copy = TileCopy<Element, Config::kBlockM, Config::kHeadDim, Config::kThreads>;
  const BackwardParams& params = keys.params;
  const int row = step.block * Config::kBlockM, rows = keys.sequence.seqlen_q - row;
  const uint32_t query = shared + Config::kQueryAt + stage * 2 * Config::kQueryBytes;
  Copy(query, keys.sequence.template q_rows<Element>(params.forward, step.head, row),
       params.forward.q_row_stride)
      .issue(params.forward.q_row_stride, rows, params.forward.head_dim);
  Copy(query + Config::kQueryBytes,
       keys.sequence.query_rows(static_cast<const Element*>(params.dout), params.dout_batch_stride,
                                params.dout_row_stride, params.dout_head_stride, step.head, row),
       params.dout_row_stride)
      .issue(params.dout_row_stride, rows, params.forward.head_dim_v);
  constexpr int kCopies = Config::kRowBytes / 16;
  if (threadIdx.x < 2 * kCopies) {
    const float* source = threadIdx.x < kCopies ? params.softmax_lse_log2 : params.row_sums;
    const uint32_t rows_at = shared + Config::kRowsAt + stage * 2 * Config::kRowBytes;
    ptx::cp_async_16(rows_at + threadIdx.x * 16, source + keys.workspace(step) + threadIdx.x % kCopies * 4,
                     true);
  }
  ptx::cp_async_commit();
}

// Where this warp and lane work.
template <class Config>
struct PairShare {
  int pair;
  int key;     // first key of the pair within the block
  uint32_t a;  // this lane's place in an A operand, or in a transposed B operand, of a shared tile
  uint32_t b;  // the same for a B operand that is not transposed
  uint32_t shared;

  __device__ __forceinline__ explicit PairShare(uint8_t* shared_memory) {
    using Shared = SharedTile<Config::kHeadDim>;
    pair = threadIdx.x / 32 % Config::kPairs;
    key = pair * Config::kWarpKeys;
    const FragmentLane of_a = FragmentLane::of_a(), of_b = FragmentLane::of_b();
    a = Shared::offset(of_a.row, of_a.chunk);
    b = Shared::offset(of_b.row, of_b.chunk);
    shared = ptx::shared_address(shared_memory);
  }

  __device__ __forceinline__ uint32_t keys() const {
    return shared + key * SharedTile<Config::kHeadDim>::kRowBytes;
  }
  __device__ __forceinline__ uint32_t queries(int stage, int chunk) const {
    return shared + Config::kQueryAt + stage * 2 * Config::kQueryBytes +
           chunk * Config::kChunk * SharedTile<Config::kHeadDim>::kRowBytes;
  }
  // LSE (`which` = 0) or D (1) of the two queries of this lane in tile n of a chunk.
  __device__ __forceinline__ float2 row_values(int stage, int which, int chunk, int n) const {
    const uint32_t rows = shared + Config::kRowsAt + (stage * 2 + which) * Config::kRowBytes;
    return ptx::load_shared_floats(rows + (chunk * Config::kChunk + n * 8 + threadIdx.x % 4 * 2) * 4);
  }
  __device__ __forceinline__ int barrier(int chunk) const { return 1 + pair * Config::kChunks + chunk; }
};

}  // namespace flash_attn::mma
