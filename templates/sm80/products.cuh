// The two matrix products of the forward pass, S = Q K^T and O += P V, as one warp computes them with
// mma.sync.
#pragma once

#include <cstdint>

#include "common/accumulator.cuh"
#include "common/shared_tile.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "sm80/config.cuh"

namespace flash_attn::sm80 {

// Which part of the tile this warp computes: rows from `row`, keys from `key` of each block, columns of O
// from `dim`.
template <class Config>
struct WarpPart {
  int row;
  int key;
  int dim;

  __device__ __forceinline__ WarpPart() {
    const int warp = threadIdx.x / 32, in_row = warp % Config::Tile::kWarpsPerRow;
    row = warp / Config::Tile::kWarpsPerRow * Config::kWarpRows;
    key = in_row * Config::kWarpKeys;
    dim = in_row * Config::kWarpDims;
  }
};

// The shared addresses from which this lane reads fragments with ldmatrix. Lanes 8..15 address rows 8..15 for
// A operands and for transposed B (V), columns 8..15 for B (K); lanes 16..31 the other way round.
template <class Config>
struct FragmentAddresses {
  using Shared = SharedTile<Config::kHeadDim>;
  uint32_t query;
  uint32_t key;
  uint32_t value;

  __device__ __forceinline__ FragmentAddresses(uint32_t shared, const WarpPart<Config>& part) {
    const int lane = threadIdx.x % 32;
    const int low = lane % 8 + (lane / 8 % 2) * 8, high = lane / 16;
    const uint32_t keys = shared + Config::kQueryBytes;
    query = shared + Shared::offset(part.row + low, high);
    key = keys + Shared::offset(part.key + lane % 8 + (lane / 16) * 8, lane / 8 % 2);
    value = keys + Config::kKeyBytes + Shared::offset(part.key + low, part.dim / 8 + high);
  }
};

// S = Q K^T for this warp's rows. The scores are zeroed here and not where they are declared: that allocates
// registers worse, 2 % of the time at head dim 64 under a causal mask.
template <class Config>
__device__ __forceinline__ void compute_scores(Accumulator<Config::kTilesM, Config::kTilesN>& scores,
                                               uint32_t query_address, uint32_t key_address) {
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
#pragma unroll
    for (int m = 0; m < Config::kTilesM; ++m) {
      ptx::ldmatrix_x4(a[m], Shared::advance(query_address, 2 * k) + m * 16 * Shared::kRowBytes);
    }
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

// O += P V for kWarpKeys keys, with P in fp32 or already rounded.
template <class Config, class AnyProbs>
__device__ __forceinline__ void accumulate_output(Accumulator<Config::kTilesM, Config::kTilesD>& output,
                                                  const AnyProbs& probs, uint32_t value_address) {
  using Shared = SharedTile<Config::kHeadDim>;
#pragma unroll
  for (int k = 0; k < Config::kTilesN / 2; ++k) {
    uint32_t a[Config::kTilesM][4];
#pragma unroll
    for (int m = 0; m < Config::kTilesM; ++m) get_operand<Config::kDtype>(a[m], probs, m, k);
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

}  // namespace flash_attn::sm80
