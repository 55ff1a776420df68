// Attention over a KV cache by mma.sync and cp.async: few queries, many keys, which bound it by memory
// (Flash-Decoding; FlashAttention-2, algorithm 1). Read from cache_kernel at the end upwards: kernel, loop,
// ring.
//
// One thread block computes kBlockM rows over one part of the keys. The query heads that share a head of
// keys are packed into the rows. Blocks of K and V arrive in a ring of kStages buffers each:
//
//   barrier  what has arrived   what has been read by then, so that its buffer is refilled
//   first    K[n]               V[n - 1], by V[n - 1 + kStages]
//   second   V[n]               K[n], by K[n + kStages]
//
// Where every warp has keys of its own, a barrier is one of the warp alone; their results are merged at the
// end. Rows that are not aligned for cp.async are loaded and stored by elements, in a kernel of their own:
// what is stored before a barrier has arrived behind it, so that the table holds there too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "mma/cache/config.cuh"
#include "mma/cache/key_copy.cuh"
#include "mma/cache/merge_warps.cuh"
#include "mma/products.cuh"
#include "problem/kv_cache.cuh"
#include "problem/sequence.cuh"
#include "problem/work.cuh"
#include "ptx/async_copy.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/accumulator.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/shared_tile.cuh"
#include "warp/softmax.cuh"

namespace flash_attn::mma {

struct CacheArguments {
  CacheParams params;
  int heads;  // of keys
  int tiles_m;
  int group;   // query heads for each head of keys
  int blocks;  // thread blocks for each sequence
};

template <class Config>
__device__ __forceinline__ void load_queries(const QueryBlock& queries, uint32_t shared) {
  using Element = typename Config::Element;
  constexpr int kChunks = Config::kHeadDim / 8, kTotal = Config::kBlockM * kChunks;
  constexpr int kBatch = 2;  // loads of a thread on their way at a time
#pragma unroll 1
  for (int first = threadIdx.x; first < kTotal; first += kBatch * Config::kThreads) {
    uint4 values[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * Config::kThreads, row = at / kChunks, chunk = at % kChunks;
      if (row < queries.rows && chunk * 8 < queries.params->head_dim) {
        values[i] = *reinterpret_cast<const uint4*>(queries.query<Element>(row) + chunk * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i * Config::kThreads;
      if (at >= kTotal) break;
      ptx::store_shared_16(shared + SharedTile<Config::kHeadDim>::offset(at / kChunks, at % kChunks),
                           values[i]);
    }
  }
}

// Brings a sequence's row of the block table into L2 while its length is not known yet: 32 pages a thread.
__device__ __forceinline__ void prefetch_block_table(const CacheParams& params, int batch) {
  const int64_t pages = params.page_size > 0 ? params.forward.seqlen_k / params.page_size : 0;
  const int64_t first = int64_t{threadIdx.x} * 32;
  if (first >= pages || batch >= params.forward.batch) return;
  ptx::prefetch_l2(params.block_table + batch * params.block_table_stride + first);
}

// A warp's rows of the tile, and its keys of each block.
template <class Config>
struct KeyShare {
  int row;
  int key;
  int key_warp;

  __device__ __forceinline__ KeyShare() {
    const int warp = threadIdx.x / 32;
    key_warp = warp % Config::kWarpsN;
    row = warp / Config::kWarpsN * Config::kWarpRows;
    key = key_warp * Config::kWarpKeys;
  }
};

// The ring of shared buffers into which blocks of K and V are copied, in ascending order.
template <class Config, bool kAligned>
class KeyRing {
 public:
  using Element = typename Config::Element;
  using Blocks = KeyBlocks<Config::kMask, Config::kBlockN>;
  uint32_t stage = 0;  // of the block that is read, in bytes from the first

  __device__ __forceinline__ KeyRing(const CacheParams& params, const CachedSequence& sequence, int key_head,
                                     const Blocks& blocks, int warp_key, uint32_t shared)
      : params_(params),
        sequence_(sequence),
        blocks_(blocks),
        old_blocks_((sequence.length - sequence.k_row) / Config::kBlockN),
        copy_k_(static_cast<const Element*>(params.forward.k) + key_head * params.forward.k_head_stride,
                params.forward.k_batch_stride, params.forward.k_row_stride,
                kAligned ? params.forward.head_dim : params.cache_head_dim, Config::kOwnKeys ? warp_key : 0,
                shared),
        copy_v_(static_cast<const Element*>(params.forward.v) + key_head * params.forward.v_head_stride,
                params.forward.v_batch_stride, params.forward.v_row_stride,
                kAligned ? params.forward.head_dim_v : params.cache_head_dim_v,
                Config::kOwnKeys ? warp_key : 0, shared + Config::kKeyBytes) {}

  // Waits until the next block of K, or of V, has arrived and every warp that shares it has read the one
  // before.
  __device__ __forceinline__ void wait() const {
    ptx::cp_async_wait<2 * Config::kStages - 2>();
    if constexpr (Config::kOwnKeys) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // K of this block, or V of the block before, has been read.
  __device__ __forceinline__ void refill_keys(int block) { issue(copy_k_, block + Config::kStages, stage); }
  __device__ __forceinline__ void refill_values(int block) {
    issue(copy_v_, block + Config::kStages - 1, stage_before_);
  }

  __device__ __forceinline__ void advance() {
    stage_before_ = stage;
    stage = stage == kLastStage ? 0 : stage + Config::kStageBytes;
  }

 private:
  static constexpr uint32_t kLastStage = (Config::kStages - 1) * Config::kStageBytes;

  // The kernel before may write the keys that the call appends, but no others.
  __device__ __forceinline__ void issue(KeyCopy<Config, kAligned>& copy, int block, uint32_t offset) {
    if (block >= blocks_.begin && block < blocks_.end) {
      if (block >= old_blocks_) ptx::wait_for_dependency();
      copy.issue(params_, sequence_, block, offset);
    }
    ptx::cp_async_commit();
  }

  const CacheParams& params_;
  const CachedSequence& sequence_;
  const Blocks& blocks_;
  int old_blocks_;
  KeyCopy<Config, kAligned> copy_k_;
  KeyCopy<Config, kAligned> copy_v_;
  uint32_t stage_before_ = kLastStage;
};

// One step of the online softmax: `scores` become probabilities.
template <class Config>
__device__ __forceinline__ void update_softmax(OnlineSoftmax<Config::kTilesM>& softmax,
                                               Accumulator<Config::kTilesM, Config::kTilesN>& scores,
                                               Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                               float scale_log2) {
  float block_max[2 * Config::kTilesM];
  softmax.block_max(block_max, scores);
  if (__any_sync(0xffffffff, softmax.lags(block_max, scale_log2))) {
    float factor[2 * Config::kTilesM];
    softmax.advance(factor, block_max, scale_log2);
    softmax.rescale(output, factor);
  }
  softmax.exponentiate(scores, scale_log2);
}

// The main loop over this part's blocks of keys. It starts kStages blocks early, to fill the ring: one place
// where K is copied and one where V is, since code that is not in the cache yet costs time too.
template <class Config, class Scores, bool kAligned>
__device__ __forceinline__ void attend(const CacheParams& params, const CachedSequence& sequence,
                                       const Work<Config::kMask, Config::kBlockN>& work, const KeyPart& part,
                                       uint8_t* shared_memory) {
  using Shared = SharedTile<Config::kHeadDim>;
  const QueryBlock& queries = work.queries;
  const Scores policy{params.forward};
  const KeyShare<Config> share;
  const uint32_t shared = ptx::shared_address(shared_memory), keys = shared + Config::kQueryBytes;
  KeyRing<Config, kAligned> ring(params, sequence, queries.head, work.blocks, share.key, keys);

  const FragmentLane a = FragmentLane::of_a(), b = FragmentLane::of_b();
  const uint32_t query_address = shared + Shared::offset(share.row + a.row, a.chunk);
  const uint32_t key_address = keys + Shared::offset(share.key + b.row, b.chunk);
  const uint32_t value_address = keys + Config::kKeyBytes + Shared::offset(share.key + a.row, a.chunk);
  const QueryRows<Config::kTilesM, Config::kMask> rows(work.mask, queries.first_row + share.row,
                                                       queries.group);
  Accumulator<Config::kTilesM, Config::kTilesD> output = {};
  OnlineSoftmax<Config::kTilesM> softmax;

#pragma unroll 1
  for (int block = work.blocks.begin - Config::kStages; block < work.blocks.end; ++block) {
    if (block == work.blocks.begin) {
      ptx::wait_for_dependency();
      load_queries<Config>(queries, shared);
      __syncthreads();
    }
    ring.wait();
    ring.refill_values(block);
    Accumulator<Config::kTilesM, Config::kTilesN> scores;
    if (block >= work.blocks.begin) {
      const int key = block * Config::kBlockN + share.key;
      multiply_rows<Config::kDtype, Config::kHeadDim>(scores, query_address, key_address + ring.stage);
      policy.modify(scores, queries, work.mask.diagonal, share.row, key);
      if (work.blocks.needs_mask(block)) rows.mask(scores, key);
      update_softmax<Config>(softmax, scores, output, policy.exponent_scale());
      ring.wait();
    }
    ring.refill_keys(block);
    if (block >= work.blocks.begin) {
      accumulate_output<Config::kDtype, Config::kHeadDim, Config::kTilesN / 2>(output, scores,
                                                                               value_address + ring.stage);
    }
    ring.advance();
  }

  float inverse_sum[2 * Config::kTilesM];
  softmax.normalise(inverse_sum);  // completes the sums; O is divided by them when warps are merged
  ptx::cp_async_wait<0>();
  __syncthreads();
  WarpResults<Config> results(shared_memory);
  results.write(output, softmax, share.key_warp, share.row);
  __syncthreads();
  store_merged(params, queries, part, results, policy.exponent_scale());
}

// Heads run fastest, since their keys lie side by side in memory; then tiles of queries, which share keys.
template <class Config, class Scores, bool kAligned>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    cache_kernel(const __grid_constant__ CacheArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  using Element = typename Config::Element;
  ptx::launch_dependents();
  const CacheParams& params = arguments.params;
  // What leads to the length comes first: reading it takes longest.
  const int batch = blockIdx.x / arguments.blocks;
  prefetch_block_table(params, batch);
  const CachedSequence sequence(params, batch);
  const int index = blockIdx.x - batch * arguments.blocks;
  const int head = index % arguments.heads, rest = index / arguments.heads;
  const KeyPart part{rest / arguments.tiles_m, params.num_splits};
  const uint32_t first_row = (rest - part.index * arguments.tiles_m) * Config::kBlockM;
  // One tile of a sequence, or all of a thread block's tiles past the last one. 32 bits hold the rows
  // (check_params.cu) and cost fewer registers.
  const uint32_t rows = max(sequence.seqlen_q, 0) * arguments.group;
  const uint32_t step = batch == params.forward.batch ? arguments.tiles_m * Config::kBlockM : rows;
  for_each_tile(first_row, step, rows, [&](int row) {
    Work<Config::kMask, Config::kBlockN> work(
        QueryBlock(params.forward, sequence, batch, head, arguments.group, row, Config::kBlockM));
    work.keep(part);
    if (work.has_keys()) {
      attend<Config, Scores, kAligned>(params, sequence, work, part, shared_memory);
    } else {
      ptx::wait_for_dependency();  // the next kernel may rely on kernels before this one having finished
      store_no_keys<Element>(params, work.queries, part, threadIdx.x, Config::kThreads);
    }
  });
}

}  // namespace flash_attn::mma
