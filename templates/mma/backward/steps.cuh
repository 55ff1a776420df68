// What the warps of the backward kernel do with a step: P and dV, dS and dK, dQ.
#pragma once

#include <cstdint>

#include "mma/backward/convert.cuh"
#include "mma/backward/tile.cuh"
#include "mma/products.cuh"
#include "ptx/barrier.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "ptx/reduction.cuh"
#include "ptx/semaphore.cuh"
#include "warp/accumulator.cuh"
#include "warp/dropout.cuh"
#include "warp/mask_scores.cuh"
#include "warp/scores.cuh"
#include "warp/transposed_scores.cuh"

namespace flash_attn::mma {

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

// The mask, and scores become probabilities.
template <class Config>
__device__ __forceinline__ void exponentiate(TransposedScores<Config>& scores, const KeyTile<Config>& keys,
                                             const PairShare<Config>& share, QueryStep step, int stage,
                                             int chunk) {
  const int first_key = keys.first_key() + share.key;
  const int first_query = step.block * Config::kBlockM + chunk * Config::kChunk;
  if (keys.visible(step).needs_mask(keys.block)) {
    const KeyRows<Config::kTilesKeys, Config::kMask> rows(keys.mask, ptx::opaque(first_key),
                                                          keys.sequence.seqlen_q);
    rows.mask(scores, first_query);
  }
  const float scale_log2 = typename Config::Scores{keys.params.forward}.exponent_scale();
#pragma unroll
  for (int n = 0; n < Config::kTilesQueries; ++n) {
    const float2 lse = share.row_values(stage, 0, chunk, n);
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

// The same with softcap, ALiBi and dropout. `scores` become what multiplies dO, `key_probs` what the key warp
// gets: P times the derivative of the softcap, negative where P was dropped.
template <class Config>
__device__ __forceinline__ void exponentiate_modified(TransposedScores<Config>& scores,
                                                      TransposedScores<Config>& key_probs,
                                                      const KeyTile<Config>& keys,
                                                      const PairShare<Config>& share, QueryStep step,
                                                      int stage, int chunk) {
  const ForwardParams& params = keys.params.forward;
  const int first_key = keys.first_key() + share.key;
  const int first_query = step.block * Config::kBlockM + chunk * Config::kChunk;
  modify_transposed(scores, key_probs, ScoreModifiers(params, keys.batch, step.head), keys.mask.diagonal,
                    first_key, first_query);
  exponentiate(scores, keys, share, step, stage, chunk);
  for_each_pair(key_probs, scores, [](float& derivative, float prob) { derivative *= prob; });
  if (params.dropout_p > 0.0f) {
    const Dropout dropout(params, keys.batch * params.num_heads + step.head);
    mark_transposed_dropout(key_probs, dropout, first_key, first_query);
    for_each_pair(scores, key_probs, [](float& prob, float marked) { prob = marked < 0.0f ? 0.0f : prob; });
  }
}

// What a value warp does with a step: P, and dV += P^T dO.
template <class Config>
__device__ __forceinline__ void add_value_gradient(KeyGradient<Config>& gradient, const KeyTile<Config>& keys,
                                                   const PairShare<Config>& share, QueryStep step, int stage,
                                                   int score_stage) {
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    const uint32_t queries = share.queries(stage, chunk);
    TransposedScores<Config> scores;
    multiply_rows<Config::kDtype, Config::kHeadDim>(scores, share.keys() + share.a, queries + share.b);
    RoundedScores<Config> probs, key_probs;
    if constexpr (!Config::Scores::kFolded) {
      TransposedScores<Config> unrounded;
      exponentiate_modified(scores, unrounded, keys, share, step, stage, chunk);
      round_probs<Config::kDtype>(key_probs, unrounded);
    } else {
      exponentiate(scores, keys, share, step, stage, chunk);
    }
    round_probs<Config::kDtype>(probs, scores);
    const ScoreBlocks<Config> blocks(share.shared, score_stage, share.pair, chunk);
#pragma unroll
    for (int m = 0; m < Config::kTilesKeys; ++m) {
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        const uint32_t* p = Config::Scores::kFolded ? probs[m][k] : key_probs[m][k];
        ptx::store_shared_16(blocks.block(m, k) + threadIdx.x % 32 * 16, make_uint4(p[0], p[1], p[2], p[3]));
      }
    }
    ptx::barrier_arrive(share.barrier(chunk), 64);
    if (keys.params.dv == nullptr) continue;
    accumulate_output<Config::kDtype, Config::kHeadDim, blocks.kSteps>(
        gradient, probs, queries + Config::kQueryBytes + share.a);
  }
}

// dS^T of a block of 16 keys and 16 queries: from P^T as it was handed over, from dP^T of the first eight
// queries (`low`) and of the others (`high`), and from D, which is divided by P's factor already.
template <class Config>
__device__ __forceinline__ void differentiate_block(uint32_t (&dscores)[4], uint4 key_probs,
                                                    const float (&low)[4], const float (&high)[4],
                                                    const float2 (&d)[2], const ForwardParams& params) {
  const uint32_t probs[4] = {key_probs.x, key_probs.y, key_probs.z, key_probs.w};
  constexpr float kInverse = 1.0f / kProbsFactor<Config::kDtype>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 p = ptx::unpack<Config::kDtype>(probs[i]), delta = d[i / 2];
    const float* dp = (i < 2 ? low : high) + 2 * (i % 2);
    float x = dp[0] * kInverse, y = dp[1] * kInverse;
    if constexpr (!Config::Scores::kFolded) {
      if (params.dropout_p > 0.0f) {
        const float rescale = params.dropout_rescale;
        x = p.x < 0.0f ? 2.0f * delta.x : x * rescale;
        y = p.y < 0.0f ? 2.0f * delta.y : y * rescale;
      }
    }
    dscores[i] = ptx::pack<Config::kDtype>(p.x * (x - delta.x), p.y * (y - delta.y));
  }
}

// What a key warp does with a step: dP, dS, and dK += dS^T Q.
template <class Config>
__device__ __forceinline__ void add_key_gradient(KeyGradient<Config>& gradient, const KeyTile<Config>& keys,
                                                 const PairShare<Config>& share, int stage, int score_stage) {
  const int lane = lane_index();
#pragma unroll
  for (int chunk = 0; chunk < Config::kChunks; ++chunk) {
    const uint32_t queries = share.queries(stage, chunk);
    TransposedScores<Config> dprobs;
    multiply_rows<Config::kDtype, Config::kHeadDim>(dprobs, share.keys() + Config::kKeyBytes + share.a,
                                                    queries + Config::kQueryBytes + share.b);
    const ScoreBlocks<Config> blocks(share.shared, score_stage, share.pair, chunk);
    RoundedScores<Config> dscores;
    ptx::barrier_sync(share.barrier(chunk), 64);
#pragma unroll
    for (int m = 0; m < Config::kTilesKeys; ++m) {
      uint4 key_probs[blocks.kSteps];
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        key_probs[k] = ptx::load_shared_16(blocks.block(m, k) + lane * 16);
      }
      __syncwarp();  // dS replaces what all lanes have read
#pragma unroll
      for (int k = 0; k < blocks.kSteps; ++k) {
        float2 d[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          d[i] = share.row_values(stage, 1, chunk, 2 * k + i);
        }
        differentiate_block<Config>(dscores[m][k], key_probs[k], dprobs[m][2 * k], dprobs[m][2 * k + 1], d,
                                    keys.params.forward);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ptx::store_shared(blocks.block(m, k) + i * 128 + lane * 4, dscores[m][k][i]);
        }
      }
    }
    if (keys.params.dk == nullptr) continue;
    accumulate_output<Config::kDtype, Config::kHeadDim, blocks.kSteps>(gradient, dscores, queries + share.a);
  }
}

// dS K for this warp's share of dQ. dS lies transposed; of the four matrices of a block the second and third
// change places.
template <class Config>
__device__ __forceinline__ void multiply_scores(
    Accumulator<Config::kGradientTilesM, Config::kGradientTilesD>& gradient, uint32_t shared, int score_stage,
    const QueryGradientShare<Config>& share) {
  using Shared = SharedTile<Config::kHeadDim>;
  const int lane = lane_index();
  const FragmentLane of_b = FragmentLane::of_a();  // K is read transposed
  const uint32_t in_block = (lane / 8 % 2 * 2 + lane / 16) * 128 + lane % 8 * 16;
  uint32_t key_address[Config::kGradientTilesD / 2];
#pragma unroll
  for (int n = 0; n < Config::kGradientTilesD / 2; ++n) {
    key_address[n] = shared + Shared::offset(of_b.row, share.column / 8 + 2 * n + of_b.chunk);
  }
#pragma unroll
  for (int k = 0; k < Config::kBlockN / 16; ++k) {
    uint32_t a[Config::kGradientTilesM][4];
#pragma unroll
    for (int m = 0; m < Config::kGradientTilesM; ++m) {
      const int query_tile = share.row / 16 + m;
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

// This warp's share of dQ += dS K for a step whose dS lies in `score_stage`. Additions of other thread blocks
// come in any order, unless there are semaphores: then those of the blocks of keys behind come first.
template <class Config>
__device__ __forceinline__ void add_query_gradient(const KeyTile<Config>& keys, QueryStep step,
                                                   uint32_t shared, int score_stage) {
  if (keys.params.dq == nullptr) return;
  const QueryGradientShare<Config> share;
  const int64_t row = keys.workspace(step);
  Accumulator<Config::kGradientTilesM, Config::kGradientTilesD> gradient = {};
  multiply_scores<Config>(gradient, shared, score_stage, share);

  int32_t* semaphore = nullptr;
  if (keys.params.semaphores != nullptr) {
    semaphore = keys.params.semaphores + row + threadIdx.x / 32;
    ptx::wait_for_turn(semaphore, keys.turn(step));
  }
  float* sums = share.sums(keys.params, row);
#pragma unroll
  for (int i = 0; i < share.kFragments; ++i) {
    ptx::add_global<GradientFragment::kElementStride>(
        sums + i * GradientFragment::kFloats,
        gradient[i / Config::kGradientTilesD][i % Config::kGradientTilesD]);
  }
  if (semaphore != nullptr) ptx::pass_turn(semaphore);
}

}  // namespace flash_attn::mma
