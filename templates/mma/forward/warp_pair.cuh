// What a warp computes of a tile, alone or as one of two that share rows of queries: then each has half of
// the columns of S and half of the columns of O.
//
// For wide heads one warp cannot hold 32 rows of O. With 16 rows per warp every fragment of K and V that
// ldmatrix reads would feed half as many products, and shared memory would be the bottleneck. A pair keeps 32
// rows, at the price of exchanging probabilities, and where maxima lag those: 2 bytes written and 2 read for
// each score, against kHeadDim * 4 / 32 bytes of K and V.
#pragma once

#include <cstdint>

#include "mma/products.cuh"
#include "ptx/barrier.cuh"
#include "warp/accumulator.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

// What a warp has of a tile: rows from `row`, keys from `key` of each block, columns of O
// from `dim`.
template <class Config>
struct WarpShare {
  int row;
  int key;
  int dim;

  __device__ __forceinline__ WarpShare() {
    const int warp = threadIdx.x / 32, in_row = warp % Config::Tile::kWarpsPerRow;
    row = warp / Config::Tile::kWarpsPerRow * Config::kWarpRows;
    key = in_row * Config::kWarpKeys;
    dim = in_row * Config::kWarpDims;
  }
};

// The shared addresses from which this lane reads fragments with ldmatrix.
template <class Config>
struct FragmentAddresses {
  using Shared = SharedTile<Config::kHeadDim>;
  uint32_t query;
  uint32_t key;
  uint32_t value;

  __device__ __forceinline__ FragmentAddresses(uint32_t shared, const WarpShare<Config>& share) {
    const FragmentLane a = FragmentLane::of_a(), b = FragmentLane::of_b();
    const uint32_t keys = shared + Config::kQueryBytes;
    query = shared + Shared::offset(share.row + a.row, a.chunk);
    key = keys + Shared::offset(share.key + b.row, b.chunk);
    value = keys + Config::kKeyBytes + Shared::offset(share.key + a.row, share.dim / 8 + a.chunk);
  }
};

template <class Config>
class WarpPair {
 public:
  static constexpr int kRows = 2 * Config::kTilesM;

  __device__ __forceinline__ explicit WarpPair(uint8_t* shared)
      : probs_(reinterpret_cast<uint4*>(shared) + threadIdx.x),
        rows_(reinterpret_cast<float*>(shared + Config::kProbsBytes) + threadIdx.x / 4) {}

  // Combines a value per row with the other warp's by `function`.
  template <class Function>
  __device__ __forceinline__ void combine_rows(float (&values)[kRows], Function function) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (threadIdx.x % 4 == 0) rows_[row * Config::kThreads / 4] = values[row];
    }
    sync();
#pragma unroll
    for (int row = 0; row < kRows; ++row)
      values[row] = function(values[row], rows_[row * Config::kThreads / 4 + to_other(8)]);
  }

  __device__ __forceinline__ void send(const RoundedProbs<Config::kTilesM, Config::kTilesN>& probs) const {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint32_t* p = probs[i / kSteps][i % kSteps];
      probs_[i * Config::kThreads] = make_uint4(p[0], p[1], p[2], p[3]);
    }
  }

  __device__ __forceinline__ void receive(RoundedProbs<Config::kTilesM, Config::kTilesN>& probs) const {
    sync();
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint4 p = probs_[i * Config::kThreads + to_other(32)];
      uint32_t* fragment = probs[i / kSteps][i % kSteps];
      fragment[0] = p.x, fragment[1] = p.y, fragment[2] = p.z, fragment[3] = p.w;
    }
  }

 private:
  static constexpr int kSteps = Config::kTilesN / 2;
  static constexpr int kFragments = Config::kTilesM * kSteps;

  // Warps 2 i and 2 i + 1 are a pair.
  __device__ static __forceinline__ int to_other(int per_warp) {
    return threadIdx.x / 32 % 2 == 0 ? per_warp : -per_warp;
  }
  __device__ static __forceinline__ void sync() { ptx::barrier_sync(1 + threadIdx.x / 64, 64); }

  uint4* probs_;
  float* rows_;
};

}  // namespace flash_attn::mma
