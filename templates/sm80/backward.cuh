// Backward attention for GPUs with mma.sync m16n8k16 and cp.async (Ampere and later); FlashAttention-2,
// algorithm 2.
//
// One thread block computes kBlockN rows of dK and dV for one head of K and V. It keeps K and V in shared
// memory and steps through blocks of queries, of all heads that share these keys. Scores are transposed, S^T
// = K Q^T, so that P^T and dS^T leave the tensor cores as operands of the next products.
//
// Warps work in pairs that share kWarpKeys keys, because one warp has no room for 32 rows of both dV and dK:
//
//   value warp   S^T = K Q^T, P^T = exp(S^T - LSE), hands P^T over                      dV += P^T dO
//   key warp     dP^T = V dO^T                       dS^T = P^T (dP^T - D), stores dS^T  dK += dS^T Q
//
// and all warps together dQ += dS K, added up in global memory. With two stages for the scores dQ of a step
// is computed during the next one, by value warps last and by key warps first: so that key warps need P when
// it is ready, and the tensor cores work while value warps exponentiate. One barrier a step:
//
//   barrier           what has arrived                           what every warp is done with
//   step              Q, dO, LSE, D of this step; dS of the last  Q, dO of the last step; dS of the one
//   before pair and chunk    P of a chunk, from value to key warp (one score stage) dS of this step Q and dO
//   of this step
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/accumulator.cuh"
#include "common/backward_prepare.cuh"
#include "common/backward_workspace.cuh"
#include "common/dropout.cuh"
#include "common/mask.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/sequence.cuh"
#include "common/shared_tile.cuh"
#include "common/store_tile.cuh"
#include "common/transposed_scores.cuh"
#include "host/device.h"
#include "host/launch.h"
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/reduction.cuh"
#include "ptx/semaphore.cuh"
#include "ptx/shared_memory.cuh"
#include "sm80/backward_config.cuh"
#include "sm80/backward_convert.cuh"
#include "sm80/products.cuh"

namespace flash_attn::sm80 {

// Q, dO and dQ of the heads of a section stay in L2 while it runs. In deterministic calls all heads are one
// section: thread blocks that run at the same time then seldom wait for one another.
constexpr int64_t kBackwardSectionBytes = int64_t{16} << 20;

struct BackwardArguments {
  BackwardParams params;
  TileSchedule schedule;  // blocks of keys, the last one first
};

// A block of queries of one head.
struct QueryStep {
  int head;
  int block;
};

// What a thread block computes: a block of keys of one head, and the queries that see any of them.
template <class Config>
struct KeyBlock {
  using Element = typename Config::Element;
  const BackwardParams& params;
  Sequence sequence;
  AttentionMask<Config::kMask> mask;
  int batch;
  int key_head;
  int block;
  int first_step;  // blocks of queries [first_step, end_step) of each head of the group
  int end_step;

  __device__ __forceinline__ KeyBlock(const BackwardParams& params, const Sequence& sequence, int batch,
                                      int key_head, int block)
      : params(params),
        sequence(sequence),
        mask(params.forward, sequence.seqlen_q, sequence.seqlen_k),
        batch(batch),
        key_head(key_head),
        block(block) {
    const int last_key = min(first_key() + Config::kBlockN, sequence.seqlen_k) - 1;
    first_step = mask.first_query(first_key()) / Config::kBlockM;
    end_step = (max(mask.end_query(last_key, sequence.seqlen_q), 0) + Config::kBlockM - 1) / Config::kBlockM;
  }

  __device__ __forceinline__ int first_key() const { return block * Config::kBlockN; }
  __device__ __forceinline__ int keys() const { return sequence.seqlen_k - first_key(); }
  __device__ __forceinline__ int group() const {
    return params.forward.num_heads / params.forward.num_heads_k;
  }
  __device__ __forceinline__ int steps() const { return max(end_step - first_step, 0) * group(); }
  __device__ __forceinline__ QueryStep first() const { return {key_head * group(), first_step}; }
  __device__ __forceinline__ bool is_first(QueryStep step) const {
    return step.block == first_step && step.head == key_head * group();
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

  // Row of the workspace at which a step's tile starts.
  __device__ __forceinline__ int64_t workspace(QueryStep step) const {
    return workspace_row(params, batch, step.head) + step.block * Config::kBlockM;
  }
};

template <class Config>
__device__ __forceinline__ void load_keys(const KeyBlock<Config>& keys, uint32_t shared) {
  using Element = typename Config::Element;
  using Copy = TileCopy<Element, Config::kBlockN, Config::kHeadDim, Config::kThreads>;
  const ForwardParams& params = keys.params.forward;
  Copy k(shared, keys.sequence.template k_rows<Element>(params, keys.key_head), params.k_row_stride);
  k.move(keys.block, params.k_row_stride);
  k.issue(params.k_row_stride, keys.keys(), params.head_dim);
  Copy v(shared + Config::kKeyBytes, keys.sequence.template v_rows<Element>(params, keys.key_head),
         params.v_row_stride);
  v.move(keys.block, params.v_row_stride);
  v.issue(params.v_row_stride, keys.keys(), params.head_dim_v);
  ptx::cp_async_commit();
}

// Starts the copies of a step's Q, dO, LSE and D into `stage`.
template <class Config>
__device__ __forceinline__ void load_step(const KeyBlock<Config>& keys, QueryStep step, uint32_t shared,
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
    const float* source = threadIdx.x < kCopies ? params.softmax_lse_log2 : params.softmax_d;
    const uint32_t rows_at = shared + Config::kRowsAt + stage * 2 * Config::kRowBytes;
    ptx::cp_async_16(rows_at + threadIdx.x * 16, source + keys.workspace(step) + threadIdx.x % kCopies * 4,
                     true);
  }
  ptx::cp_async_commit();
}

// Where this warp and lane work.
template <class Config>
struct BackwardPart {
  int pair;
  int key;     // first key of the pair within the block
  uint32_t a;  // this lane's place in an A operand, or in a transposed B operand, of a shared tile
  uint32_t b;  // the same for a B operand that is not transposed
  uint32_t shared;

  __device__ __forceinline__ explicit BackwardPart(uint8_t* shared_memory) {
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

// P^T and dS^T of a pair's chunk in shared memory, in blocks of 16 keys x 16 queries. P is handed over in the
// order of registers, 16 bytes a lane. dS replaces it, block by block, as four 8x8 matrices of eight rows of
// 16 bytes, as ldmatrix reads them.
template <class Config>
struct ScoreBlocks {
  static constexpr int kBlockBytes = 512;
  static constexpr int kSteps = Config::kTilesQueries / 2;
  uint32_t first;

  __device__ __forceinline__ ScoreBlocks(uint32_t shared, int score_stage, int pair, int chunk)
      : first(shared + Config::kScoresAt + score_stage * Config::kScoreBytes +
              (pair * Config::kChunks + chunk) * Config::kTilesKeys * kSteps * kBlockBytes) {}

  __device__ __forceinline__ uint32_t block(int m, int k) const {
    return first + (m * kSteps + k) * kBlockBytes;
  }
};

template <class Config>
using KeyGradient = Accumulator<Config::kTilesKeys, Config::kTilesD>;
template <class Config>
using TransposedScores = Accumulator<Config::kTilesKeys, Config::kTilesQueries>;
template <class Config>
using RoundedScores = RoundedProbs<Config::kTilesKeys, Config::kTilesQueries>;

// Modifiers and mask; scores become probabilities.
template <class Config>
__device__ __forceinline__ void exponentiate(TransposedScores<Config>& scores, const KeyBlock<Config>& keys,
                                             const BackwardPart<Config>& part, QueryStep step, int stage,
                                             int chunk) {
  const int first_key = keys.first_key() + part.key;
  const int first_query = step.block * Config::kBlockM + chunk * Config::kChunk;
  if (keys.visible(step).needs_mask(keys.block)) {
    apply_transposed_mask(scores, keys.mask, first_key, first_query);
  }
  const float scale_log2 = Config::kModifiers ? 1.0f : keys.params.forward.softmax_scale * kLog2E;
#pragma unroll
  for (int n = 0; n < Config::kTilesQueries; ++n) {
    const float2 lse = part.row_values(stage, 0, chunk, n);
#pragma unroll
    for (int m = 0; m < Config::kTilesKeys; ++m) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        float& score = scores[m][n][c];
        score = ptx::exp2_approx(fmaf(score, scale_log2, c % 2 == 0 ? -lse.x : -lse.y));
      }
    }
  }
}

// The same with softcap, ALiBi and dropout. `scores` become what multiplies dO, `handed` what the key warp
// gets: P times the derivative of the softcap, negative where P was dropped.
template <class Config>
__device__ __forceinline__ void exponentiate_modified(TransposedScores<Config>& scores,
                                                      TransposedScores<Config>& handed,
                                                      const KeyBlock<Config>& keys,
                                                      const BackwardPart<Config>& part, QueryStep step,
                                                      int stage, int chunk) {
  const ForwardParams& params = keys.params.forward;
  const int first_key = keys.first_key() + part.key;
  const int first_query = step.block * Config::kBlockM + chunk * Config::kChunk;
  const ScoreModifiers modifiers(params, keys.batch, step.head);
  for_each_score(scores, first_key, first_query, [&](float& score, int key, int query) {
    score = modifiers.apply(score, query + keys.mask.diagonal - key);
  });
  combine_scores(handed, scores, [](float, float score) { return score; });
  for_each_score(handed, first_key, first_query, [&](float& score, int key, int query) {
    score = modifiers.softcap_derivative(score, query + keys.mask.diagonal - key);
  });
  exponentiate(scores, keys, part, step, stage, chunk);
  combine_scores(handed, scores, [](float derivative, float prob) { return derivative * prob; });
  if (params.dropout_p > 0.0f) {
    const Dropout dropout(params, keys.batch * params.num_heads + step.head);
    mark_transposed_dropout(handed, dropout, first_key, first_query);
    combine_scores(scores, handed, [](float prob, float marked) { return marked < 0.0f ? 0.0f : prob; });
  }
}

// What a value warp does with a step: P, and dV += P^T dO.
template <class Config>
__device__ __forceinline__ void add_value_gradient(KeyGradient<Config>& gradient,
                                                   const KeyBlock<Config>& keys,
                                                   const BackwardPart<Config>& part, QueryStep step,
                                                   int stage, int score_stage) {
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    const uint32_t queries = part.queries(stage, chunk);
    TransposedScores<Config> scores;
    multiply_rows<Config::kDtype, Config::kHeadDim>(scores, part.keys() + part.a, queries + part.b);
    RoundedScores<Config> probs, handed;
    if constexpr (Config::kModifiers) {
      TransposedScores<Config> unrounded;
      exponentiate_modified(scores, unrounded, keys, part, step, stage, chunk);
      round_probs<Config::kDtype>(handed, unrounded);
    } else {
      exponentiate(scores, keys, part, step, stage, chunk);
    }
    round_probs<Config::kDtype>(probs, scores);
    const ScoreBlocks<Config> blocks(part.shared, score_stage, part.pair, chunk);
#pragma unroll
    for (int m = 0; m < Config::kTilesKeys; ++m) {
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        const uint32_t* p = Config::kModifiers ? handed[m][k] : probs[m][k];
        ptx::store_shared_16(blocks.block(m, k) + threadIdx.x % 32 * 16, make_uint4(p[0], p[1], p[2], p[3]));
      }
    }
    ptx::barrier_arrive(part.barrier(chunk), 64);
    if (keys.params.dv == nullptr) continue;
    accumulate_output<Config::kDtype, Config::kHeadDim, blocks.kSteps>(
        gradient, probs, queries + Config::kQueryBytes + part.a);
  }
}

// dS^T of a block of 16 keys and 16 queries from P^T as it was handed over, `dprobs` (two tiles of dP^T) and
// D.
template <class Config>
__device__ __forceinline__ void differentiate_block(uint32_t (&dscores)[4], uint4 handed,
                                                    const float (&low)[4], const float (&high)[4],
                                                    const float2 (&d)[2], const ForwardParams& params) {
  const uint32_t probs[4] = {handed.x, handed.y, handed.z, handed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = unpack<Config::kDtype>(probs[i]), delta = d[i / 2];
    const float* dp = (i < 2 ? low : high) + 2 * (i % 2);
    float x = dp[0], y = dp[1];
    if constexpr (Config::kModifiers) {
      if (params.dropout_p > 0.0f) {
        const float rescale = 1.0f / (1.0f - params.dropout_p);
        x = p.x < 0.0f ? 2.0f * delta.x : x * rescale;
        y = p.y < 0.0f ? 2.0f * delta.y : y * rescale;
      }
    }
    dscores[i] = pack<Config::kDtype>(p.x * (x - delta.x), p.y * (y - delta.y));
  }
}

// What a key warp does with a step: dP, dS, and dK += dS^T Q.
template <class Config>
__device__ __forceinline__ void add_key_gradient(KeyGradient<Config>& gradient, const KeyBlock<Config>& keys,
                                                 const BackwardPart<Config>& part, int stage,
                                                 int score_stage) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    const uint32_t queries = part.queries(stage, chunk);
    TransposedScores<Config> dprobs;
    multiply_rows<Config::kDtype, Config::kHeadDim>(dprobs, part.keys() + Config::kKeyBytes + part.a,
                                                    queries + Config::kQueryBytes + part.b);
    const ScoreBlocks<Config> blocks(part.shared, score_stage, part.pair, chunk);
    RoundedScores<Config> dscores;
    ptx::barrier_sync(part.barrier(chunk), 64);
#pragma unroll
    for (int m = 0; m < Config::kTilesKeys; ++m) {
      uint4 handed[blocks.kSteps];
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        handed[k] = ptx::load_shared_16(blocks.block(m, k) + lane * 16);
      }
      __syncwarp();  // dS replaces what all lanes have read
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        const float2 d[2] = {part.row_values(stage, 1, chunk, 2 * k),
                             part.row_values(stage, 1, chunk, 2 * k + 1)};
        differentiate_block<Config>(dscores[m][k], handed[k], dprobs[m][2 * k], dprobs[m][2 * k + 1], d,
                                    keys.params.forward);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::store_shared(blocks.block(m, k) + i * 128 + lane * 4, dscores[m][k][i]);
        }
      }
    }
    if (keys.params.dk == nullptr) continue;
    accumulate_output<Config::kDtype, Config::kHeadDim, blocks.kSteps>(gradient, dscores, queries + part.a);
  }
}

// dS K for this warp's part of dQ. dS lies transposed; of the four matrices of a block the second and third
// change places.
template <class Config>
__device__ __forceinline__ void multiply_scores(
    Accumulator<Config::kGradientTilesM, Config::kGradientTilesD>& gradient, uint32_t shared, int score_stage,
    const QueryGradientPart<Config>& part) {
  using Shared = SharedTile<Config::kHeadDim>;
  const int lane = threadIdx.x % 32;
  const FragmentLane of_b = FragmentLane::of_a();  // of K transposed
  const uint32_t in_block = (lane / 8 % 2 * 2 + lane / 16) * 128 + lane % 8 * 16;
  uint32_t key_address[Config::kGradientTilesD / 2];
#pragma unroll
  for (int n = 0; n < Config::kGradientTilesD / 2; ++n) {
    key_address[n] = shared + Shared::offset(of_b.row, part.column / 8 + 2 * n + of_b.chunk);
  }
#pragma unroll
  for (int k = 0; k < Config::kBlockN / 16; ++k) {
    uint32_t a[Config::kGradientTilesM][4];
#pragma unroll
    for (int m = 0; m < Config::kGradientTilesM; ++m) {
      const int query_tile = part.row / 16 + m;
      const ScoreBlocks<Config> blocks(shared, score_stage, k / Config::kTilesKeys,
                                       query_tile / (Config::kChunk / 16));
      ptx::ldmatrix_x4_trans(
          a[m], blocks.block(k % Config::kTilesKeys, query_tile % (Config::kChunk / 16)) + in_block);
    }
#pragma unroll
    for (int n = 0; n < Config::kGradientTilesD; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, key_address[n / 2] + k * 16 * Shared::kRowBytes);
#pragma unroll
      for (int m = 0; m < Config::kGradientTilesM; ++m) {
        ptx::mma_m16n8k16<Config::kDtype>(gradient[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Config::kDtype>(gradient[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// This warp's part of dQ += dS K for a step whose dS lies in `score_stage`. Additions of other thread blocks
// come in any order, unless there are semaphores: then those of the blocks of keys before come first.
template <class Config>
__device__ __forceinline__ void add_query_gradient(const KeyBlock<Config>& keys, QueryStep step,
                                                   uint32_t shared, int score_stage) {
  if (keys.params.dq == nullptr) return;
  const QueryGradientPart<Config> part;
  const int64_t row = keys.workspace(step);
  Accumulator<Config::kGradientTilesM, Config::kGradientTilesD> gradient = {};
  multiply_scores<Config>(gradient, shared, score_stage, part);

  int32_t* semaphore = nullptr;
  if (keys.params.semaphores != nullptr) {
    semaphore = keys.params.semaphores + row + threadIdx.x / 32;
    ptx::wait_for_turn(semaphore, keys.block - keys.visible(step).begin);
  }
  float* sums = part.sums(keys.params, row);
#pragma unroll
  for (int i = 0; i < part.kFragments; ++i) {
    ptx::add_global<GradientFragment::kElementStride>(
        sums + i * GradientFragment::kFloats,
        gradient[i / Config::kGradientTilesD][i % Config::kGradientTilesD]);
  }
  if (semaphore != nullptr) ptx::pass_turn(semaphore);
}

// The steps of a value warp and of a key warp: the same order of barriers.
template <class Config, bool kValueWarp>
__device__ __forceinline__ void run_steps(KeyGradient<Config>& gradient, const KeyBlock<Config>& keys,
                                          const BackwardPart<Config>& part) {
  constexpr bool kDelayed = Config::Tile::kScoreStages == 2;
  const auto add_previous = [&](QueryStep step, int stage) {
    if (!kDelayed || keys.is_first(step)) return;
    add_query_gradient(keys, keys.previous(step), part.shared, 1 - stage);
  };
  QueryStep step = keys.first();
  int stage = 0;
  for (int left = keys.steps(); left > 0; --left) {
    ptx::cp_async_wait<0>();
    ptx::barrier_sync(0, Config::kThreads);
    if (left > 1) load_step(keys, keys.next(step), part.shared, 1 - stage);
    if constexpr (kValueWarp) {
      add_value_gradient(gradient, keys, part, step, stage, kDelayed ? stage : 0);
      add_previous(step, stage);
    } else {
      add_previous(step, stage);
      add_key_gradient(gradient, keys, part, stage, kDelayed ? stage : 0);
    }
    if constexpr (!kDelayed) {
      ptx::barrier_sync(0, Config::kThreads);
      add_query_gradient(keys, step, part.shared, 0);
    }
    step = keys.next(step);
    stage = 1 - stage;
  }
  ptx::cp_async_wait<0>();
  ptx::barrier_sync(0, Config::kThreads);
  add_previous(step, stage);
}

// The epilogue of a warp: its rows of dV or dK, through the shared memory that held V or K.
template <class Config>
__device__ __forceinline__ void store_key_gradient(const KeyGradient<Config>& gradient,
                                                   const KeyBlock<Config>& keys,
                                                   const BackwardPart<Config>& part, bool value_warp) {
  using Element = typename Config::Element;
  const BackwardParams& params = keys.params;
  const float scale = value_warp ? 1.0f / (1.0f - params.forward.dropout_p) : params.forward.softmax_scale;
  float factor[2 * Config::kTilesKeys];
#pragma unroll
  for (float& f : factor) f = scale;
  const uint32_t shared = part.shared + (value_warp ? Config::kKeyBytes : 0);
  const int columns = value_warp ? params.forward.head_dim_v : params.forward.head_dim;
  auto* first = static_cast<Element*>(value_warp ? params.dv : params.dk);
  const int64_t batch_stride = value_warp ? params.dv_batch_stride : params.dk_batch_stride;
  const int64_t row_stride = value_warp ? params.dv_row_stride : params.dk_row_stride;
  const int64_t head_stride = value_warp ? params.dv_head_stride : params.dk_head_stride;
  first =
      keys.sequence.key_rows(first, batch_stride, row_stride, head_stride, keys.key_head, keys.first_key());
  store_tile<Config::kDtype, Config::kHeadDim>(shared, gradient, factor, part.key, 0, keys.keys(), columns,
                                               [&](int row) { return first + row * row_stride; });
}

template <class Config>
__device__ __forceinline__ void differentiate(const KeyBlock<Config>& keys, uint8_t* shared_memory) {
  const BackwardPart<Config> part(shared_memory);
  load_keys(keys, part.shared);
  if (keys.steps() > 0) load_step(keys, keys.first(), part.shared, 0);
  KeyGradient<Config> gradient = {};
  const bool value_warp = threadIdx.x / 32 < Config::kPairs;
  if (value_warp) {
    run_steps<Config, true>(gradient, keys, part);
  } else {
    run_steps<Config, false>(gradient, keys, part);
  }
  if (keys.params.dk == nullptr) return;
  ptx::barrier_sync(0, Config::kThreads);
  store_key_gradient(gradient, keys, part, value_warp);
}

// Zeroes the rows of dK and dV past the last varlen sequence, of which this is block `block` of `blocks`.
template <class Config>
__device__ __forceinline__ void zero_keys(const BackwardParams& params, int key_head, int block,
                                          int64_t blocks) {
  using Element = typename Config::Element;
  const ForwardParams& forward = params.forward;
  if (params.dk == nullptr) return;
  const int row_chunks = (forward.head_dim + forward.head_dim_v) / 8;
  const int64_t first = forward.cu_seqlens_k[forward.batch];
  const int64_t chunks = (forward.total_k - first) * row_chunks;
  for (int64_t i = int64_t{block} * Config::kThreads + threadIdx.x; i < chunks;
       i += blocks * Config::kThreads) {
    const int64_t row = first + i / row_chunks;
    const int chunk = static_cast<int>(i % row_chunks);
    const bool of_dk = chunk < forward.head_dim / 8;
    Element* target = of_dk ? static_cast<Element*>(params.dk) + row * params.dk_row_stride +
                                  key_head * params.dk_head_stride
                            : static_cast<Element*>(params.dv) + row * params.dv_row_stride +
                                  key_head * params.dv_head_stride;
    reinterpret_cast<uint4*>(target)[of_dk ? chunk : chunk - forward.head_dim / 8] = make_uint4(0, 0, 0, 0);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    backward_kernel(const __grid_constant__ BackwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const BackwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const int block = static_cast<int>(arguments.schedule.tiles_m) - 1 - tile.m_block;
  if (tile.batch == params.forward.batch) {
    return zero_keys<Config>(params, tile.head, block, arguments.schedule.tiles_m);
  }
  const Sequence sequence(params.forward, tile.batch);
  if (block * Config::kBlockN >= sequence.seqlen_k) return;
  differentiate(KeyBlock<Config>(params, sequence, tile.batch, tile.head, block), shared_memory);
}

// Launches the three kernels of a backward call, with the first configuration of which a multiprocessor of
// `device` holds as many thread blocks as it asks for; the last one in any case.
template <class Config, class... Others>
Status launch_backward(const BackwardParams& params, const Device& device, cudaStream_t stream,
                       const char* name) {
  if constexpr (sizeof...(Others) > 0) {
    const int needed = Config::Tile::kMinBlocks * (Config::kSharedBytes + kReservedSharedBytes);
    if (needed > device.shared_bytes_per_multiprocessor)
      return launch_backward<Others...>(params, device, stream, name);
  }
  const ForwardParams& forward = params.forward;
  const bool varlen = forward.cu_seqlens_q != nullptr;
  const int64_t query_heads = int64_t{forward.batch} * forward.num_heads;
  const auto tiles = [&](int rows) { return (forward.seqlen_q + rows - 1) / rows; };
  static std::atomic<uint64_t> prepared[4];

  const PrepareArguments prepare{params, tiles(kWorkspaceRows)};
  Status status = launch_kernel(prepare_kernel<Config>, name, device.index, query_heads * prepare.tiles,
                                kPrepareThreads, 0, stream, prepare, prepared[0]);
  if (status != Status::kOk) return status;

  const BackwardArguments arguments{
      params, make_key_schedule(forward, Config::kBlockN, Config::kMask, kBackwardSectionBytes,
                                params.semaphores != nullptr)};
  const bool modifiers = needs_modifiers(forward);
  status = launch_kernel(modifiers ? backward_kernel<ModifiedConfig<Config>> : backward_kernel<Config>, name,
                         device.index, arguments.schedule.num_tiles(), Config::kThreads, Config::kSharedBytes,
                         stream, arguments, prepared[1 + modifiers]);
  if (status != Status::kOk || params.dq == nullptr) return status;

  const ConvertArguments convert{params, tiles(Config::kBlockM)};
  const int64_t tail = varlen ? forward.num_heads : 0;
  return launch_kernel(convert_kernel<Config>, name, device.index, (query_heads + tail) * convert.tiles,
                       Config::kThreads, Config::kQueryBytes, stream, convert, prepared[3]);
}

}  // namespace flash_attn::sm80
