// Forward attention for GPUs with mma.sync m16n8k16 and cp.async (Ampere and later); FlashAttention-2, algorithm 1.
//
// One thread block computes kBlockM rows of O for one head. Its warps split the rows; all of them read the same K and V.
//
//   wait    who waits, for what                                     protects
//   top     all warps: K[n] has arrived, V[n + 1] has been read     V's buffer, refilled next (one stage)
//   middle  all warps: V[n] has arrived, K[n] has been read         K's buffer, refilled next (one stage)
//   With two stages K[n] and V[n] arrive together and `top` alone protects the other stage.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/dropout.cuh"
#include "common/mask.cuh"
#include "common/schedule.cuh"
#include "common/scores.cuh"
#include "common/sequence.cuh"
#include "common/shared_tile.cuh"
#include "common/softmax.cuh"
#include "host/launch.h"
#include "ptx/async_copy.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "sm80/config.cuh"

namespace flash_attn::sm80 {

struct ForwardArguments {
  ForwardParams params;
  TileSchedule schedule;
};

// Accumulators of mma.sync: element [m][n] is the 16x8 tile in tile row m and tile column n.
template <int kTilesM, int kTilesN>
using Accumulator = float[kTilesM][kTilesN][4];

// The shared addresses from which this lane reads fragments with ldmatrix. Lanes 8..15 address rows 8..15 for A operands and
// for transposed B (V), columns 8..15 for B (K); lanes 16..31 the other way round.
template <class Config>
struct FragmentAddresses {
  using Shared = SharedTile<Config::kHeadDim>;
  uint32_t query;
  uint32_t key;
  uint32_t value;

  __device__ __forceinline__ explicit FragmentAddresses(uint32_t shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int low = lane % 8 + (lane / 8 % 2) * 8, high = lane / 16;
    query = shared + Shared::offset(warp * Config::kWarpRows + low, high);
    key = shared + Config::kQueryBytes + Shared::offset(lane % 8 + (lane / 16) * 8, lane / 8 % 2);
    value = shared + Config::kQueryBytes + Config::Tile::kStages * Config::kKeyBytes + Shared::offset(low, high);
  }
};

// The A operand Q: read once into registers, or from shared memory at each use where registers are short.
template <class Config>
struct QueryFragments {
  using Shared = SharedTile<Config::kHeadDim>;
  static constexpr bool kHeld = Config::Tile::kQueryInRegisters;
  uint32_t address;
  uint32_t held[kHeld ? Config::kHeadDim / 16 : 1][Config::kTilesM][4];

  __device__ __forceinline__ explicit QueryFragments(uint32_t address) : address(address) {}

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int k = 0; k < Config::kHeadDim / 16; ++k) read(held[k], k);
  }

  __device__ __forceinline__ void get(uint32_t (&fragment)[Config::kTilesM][4], int k) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4 * Config::kTilesM; ++i) fragment[i / 4][i % 4] = held[k][i / 4][i % 4];
    } else {
      read(fragment, k);
    }
  }

 private:
  __device__ __forceinline__ void read(uint32_t (&fragment)[Config::kTilesM][4], int k) const {
#pragma unroll
    for (int m = 0; m < Config::kTilesM; ++m) {
      ptx::ldmatrix_x4(fragment[m], Shared::advance(address, 2 * k) + m * 16 * Shared::kRowBytes);
    }
  }
};

// S = Q K^T for this warp's rows.
template <class Config>
__device__ __forceinline__ void compute_scores(Accumulator<Config::kTilesM, Config::kTilesN>& scores,
                                               const QueryFragments<Config>& query, uint32_t key_address) {
  using Shared = SharedTile<Config::kHeadDim>;
#pragma unroll
  for (int m = 0; m < Config::kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < Config::kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[m][n][c] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < Config::kHeadDim / 16; ++k) {
    uint32_t a[Config::kTilesM][4];
    query.get(a, k);
    const uint32_t key_column = Shared::advance(key_address, 2 * k);
#pragma unroll
    for (int n = 0; n < Config::kTilesN; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, key_column + n * 8 * Shared::kRowBytes);
#pragma unroll
      for (int m = 0; m < Config::kTilesM; ++m) {
        ptx::mma_m16n8k16<Config::kDtype>(scores[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Config::kDtype>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// O += P V. Two neighbouring accumulator tiles of P are, rounded to 16 bits, one A operand: no exchange between lanes.
template <class Config>
__device__ __forceinline__ void accumulate_output(Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                                  const Accumulator<Config::kTilesM, Config::kTilesN>& probs,
                                                  uint32_t value_address) {
  using Shared = SharedTile<Config::kHeadDim>;
#pragma unroll
  for (int k = 0; k < Config::kBlockN / 16; ++k) {
    uint32_t a[Config::kTilesM][4];
#pragma unroll
    for (int m = 0; m < Config::kTilesM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* p = probs[m][2 * k + i / 2] + 2 * (i % 2);
        a[m][i] = pack<Config::kDtype>(p[0], p[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kTilesD; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Shared::advance(value_address, n) + k * 16 * Shared::kRowBytes);
#pragma unroll
      for (int m = 0; m < Config::kTilesM; ++m) {
        ptx::mma_m16n8k16<Config::kDtype>(output[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<Config::kDtype>(output[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Calls function(score, row, column) for every score of the block that this lane holds, with coordinates in the sequence.
template <int kTilesM, int kTilesN, class Function>
__device__ __forceinline__ void for_each_score(Accumulator<kTilesM, kTilesN>& scores, int first_row, int first_column,
                                               Function function) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          function(scores[m][n][2 * half + c], row, first_column + 2 * (lane % 4) + n * 8 + c);
        }
      }
    }
  }
}

template <Mask kMask, int kTilesM, int kTilesN>
__device__ __forceinline__ void apply_mask(Accumulator<kTilesM, kTilesN>& scores, const AttentionMask<kMask>& mask,
                                           int first_row, int first_column) {
  for_each_score(scores, first_row, first_column, [&](float& score, int row, int column) {
    if (column >= mask.end_key(row) || column < mask.first_key(row)) score = -INFINITY;
  });
}

// Zeroes the dropped probabilities; what is kept is rescaled once, with the output.
template <int kTilesM, int kTilesN>
__device__ __forceinline__ void apply_dropout(Accumulator<kTilesM, kTilesN>& probs, const Dropout& dropout, int first_row,
                                              int first_column) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      const uint4 words = dropout.words(first_row / 16 + m, first_column / 16 + n / 2, threadIdx.x % 32);
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (!dropout.keeps(word[i / 2], i % 2)) probs[m][n + i / 4][i % 4] = 0.0f;
      }
    }
  }
}

// Writes this warp's rows of O through its own rows of shared Q, so that the stores to global memory are 16 bytes wide.
template <class Config>
__device__ __forceinline__ void store_output(const Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                             const float (&factor)[2 * Config::kTilesM], uint32_t shared,
                                             typename Config::Element* out, int64_t row_stride, int valid_rows,
                                             int head_dim) {
  using Shared = SharedTile<Config::kHeadDim>;
  constexpr int kChunks = Config::kHeadDim / 8;
  const int lane = threadIdx.x % 32;
  const int warp_row = threadIdx.x / 32 * Config::kWarpRows;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Config::kTilesM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + m * 16 + half * 8 + lane / 4;
      const float scale = factor[2 * m + half];
#pragma unroll
      for (int n = 0; n < Config::kTilesD; ++n) {
        const uint32_t value = pack<Config::kDtype>(output[m][n][2 * half] * scale, output[m][n][2 * half + 1] * scale);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared + Shared::offset(row, n) + lane % 4 * 4), "r"(value)
                     : "memory");
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < Config::kWarpRows * kChunks; i += 32) {
    const int row = warp_row + i / kChunks, chunk = i % kChunks;
    if (row >= valid_rows || chunk * 8 >= head_dim) continue;
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared + Shared::offset(row, chunk)));
    *reinterpret_cast<uint4*>(out + row * row_stride + chunk * 8) = value;
  }
}

// Rows that see no key: O = 0, LSE = +inf.
template <class Config>
__device__ void store_empty_rows(typename Config::Element* out, int64_t row_stride, float* lse, int rows, int head_dim) {
  const int chunks = head_dim / 8;
  for (int i = threadIdx.x; i < rows * chunks; i += Config::kThreads) {
    *reinterpret_cast<uint4*>(out + i / chunks * row_stride + i % chunks * 8) = make_uint4(0, 0, 0, 0);
  }
  for (int row = threadIdx.x; row < rows; row += Config::kThreads) lse[row] = INFINITY;
}

// Everything one thread block computes for the queries [first_row, first_row + kBlockM) of one head.
template <class Config, bool kModifiers>
__device__ __forceinline__ void forward_tile(const ForwardParams& params, const Sequence& sequence, int batch, int head,
                                             int first_row, uint32_t shared) {
  using Element = typename Config::Element;
  using Tile = typename Config::Tile;
  using CopyQuery = TileCopy<Config::kBlockM, Config::kHeadDim, Config::kThreads>;
  using CopyKeys = TileCopy<Config::kBlockN, Config::kHeadDim, Config::kThreads>;

  const int rows = min(sequence.seqlen_q - first_row, Config::kBlockM);
  Element* out = static_cast<Element*>(params.out) + sequence.q_batch * params.out_batch_stride +
                 (sequence.q_row + first_row) * params.out_row_stride + head * params.out_head_stride;
  float* lse = params.softmax_lse + sequence.q_batch * params.lse_batch_stride + head * params.lse_head_stride +
               sequence.q_row + first_row;

  const AttentionMask<Config::kMask> mask(params, sequence.seqlen_q, sequence.seqlen_k);
  const KeyBlocks<Config::kMask, Config::kBlockN> blocks(mask, first_row, first_row + rows - 1);
  if (blocks.begin >= blocks.end) {
    store_empty_rows<Config>(out, params.out_row_stride, lse, rows, params.head_dim);
    return;
  }

  const int key_head = head / (params.num_heads / params.num_heads_k);
  const Element* q = static_cast<const Element*>(params.q) + sequence.q_batch * params.q_batch_stride +
                     (sequence.q_row + first_row) * params.q_row_stride + head * params.q_head_stride;
  const Element* k = static_cast<const Element*>(params.k) + sequence.k_batch * params.k_batch_stride +
                     sequence.k_row * params.k_row_stride + key_head * params.k_head_stride;
  const Element* v = static_cast<const Element*>(params.v) + sequence.k_batch * params.v_batch_stride +
                     sequence.k_row * params.v_row_stride + key_head * params.v_head_stride;
  const uint32_t shared_k = shared + Config::kQueryBytes;
  const uint32_t shared_v = shared_k + Tile::kStages * Config::kKeyBytes;
  auto copy_keys = [&](uint32_t destination, const Element* source, int64_t row_stride, int block) {
    CopyKeys::issue(destination, source + int64_t{block} * Config::kBlockN * row_stride, row_stride,
                    sequence.seqlen_k - block * Config::kBlockN, params.head_dim);
  };

  int block = blocks.end - 1;
  CopyQuery::issue(shared, q, params.q_row_stride, rows, params.head_dim);
  copy_keys(shared_k, k, params.k_row_stride, block);
  if constexpr (Tile::kStages == 2) copy_keys(shared_v, v, params.v_row_stride, block);
  ptx::cp_async_commit();

  const FragmentAddresses<Config> addresses(shared);
  QueryFragments<Config> query(addresses.query);
  Accumulator<Config::kTilesM, Config::kTilesD> output = {};
  OnlineSoftmax<Config::kTilesM> softmax;
  const int warp_row = first_row + threadIdx.x / 32 * Config::kWarpRows;
  const float scale_log2 = kModifiers ? 1.0f : params.softmax_scale * kLog2E;

  if constexpr (QueryFragments<Config>::kHeld) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    query.hold();
  }
  int stage = 0;
  for (; block >= blocks.begin; --block) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    if constexpr (Tile::kStages == 1) {
      copy_keys(shared_v, v, params.v_row_stride, block);
      ptx::cp_async_commit();
    } else if (block > blocks.begin) {
      copy_keys(shared_k + (stage ^ 1) * Config::kKeyBytes, k, params.k_row_stride, block - 1);
      copy_keys(shared_v + (stage ^ 1) * Config::kKeyBytes, v, params.v_row_stride, block - 1);
      ptx::cp_async_commit();
    }

    Accumulator<Config::kTilesM, Config::kTilesN> scores;
    compute_scores<Config>(scores, query, addresses.key + stage * Config::kKeyBytes);
    if constexpr (kModifiers) {
      const ScoreModifiers modifiers(params, batch, head);
      for_each_score(scores, warp_row, block * Config::kBlockN, [&](float& score, int row, int column) {
        score = modifiers.apply(score, row + mask.diagonal - column);
      });
    }
    if (blocks.needs_mask(block)) apply_mask(scores, mask, warp_row, block * Config::kBlockN);

    if constexpr (Tile::kStages == 1) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (block > blocks.begin) {
        copy_keys(shared_k, k, params.k_row_stride, block - 1);
        ptx::cp_async_commit();
      }
    }
    softmax.update(scores, output, scale_log2);
    if constexpr (kModifiers) {
      if (params.dropout_p > 0.0f) {
        const Dropout dropout(params, batch * params.num_heads + head);
        apply_dropout(scores, dropout, warp_row, block * Config::kBlockN);
      }
    }
    accumulate_output<Config>(output, scores, addresses.value + stage * Config::kKeyBytes);
    if constexpr (Tile::kStages == 2) stage ^= 1;
  }

  float factor[2 * Config::kTilesM];
  softmax.finish(factor);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2 * Config::kTilesM; ++i) {
    const int row = warp_row - first_row + i / 2 * 16 + i % 2 * 8 + lane / 4;
    if (lane % 4 == 0 && row < rows) lse[row] = softmax.log_sum_exp(i, scale_log2);
    if constexpr (kModifiers) factor[i] /= 1.0f - params.dropout_p;
  }
  store_output<Config>(output, factor, shared, out, params.out_row_stride, rows, params.head_dim);
}

template <class Config, bool kModifiers>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kMinBlocks)
    forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  const ForwardParams& params = arguments.params;
  const TileSchedule::Tile tile = arguments.schedule.tile(blockIdx.x);
  const Sequence sequence(params, tile.batch);
  const uint32_t shared = ptx::shared_address(shared_memory);
  // One tile, but for the rows past the last varlen sequence, of which there may be more than in the longest sequence.
  for (int row = tile.m_block * Config::kBlockM; row < sequence.seqlen_q; row += arguments.schedule.tiles_m * Config::kBlockM) {
    if (row != tile.m_block * Config::kBlockM) __syncthreads();
    forward_tile<Config, kModifiers>(params, sequence, tile.batch, tile.head, row, shared);
  }
}

// Plain softmax(scale Q K^T) V runs the kernel without score modifiers; a scale that is not positive needs them, because
// the plain kernel takes the maximum before it scales.
inline bool needs_modifiers(const ForwardParams& params) {
  return params.alibi_slopes != nullptr || params.softcap > 0.0f || params.dropout_p > 0.0f ||
         !(params.softmax_scale > 0.0f);
}

template <class Config>
Status launch_forward(const ForwardParams& params, cudaStream_t stream, const char* name) {
  ForwardArguments arguments{params, make_schedule(params, Config::kBlockM, Config::kMask)};
  const bool modifiers = needs_modifiers(params);
  static std::atomic<uint64_t> prepared[2];
  return launch_kernel(modifiers ? forward_kernel<Config, true> : forward_kernel<Config, false>, name,
                       arguments.schedule.num_tiles(), Config::kThreads, Config::kSharedBytes, stream, arguments,
                       prepared[modifiers]);
}

}  // namespace flash_attn::sm80
