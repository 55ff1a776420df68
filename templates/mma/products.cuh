// Matrix products as one warp computes them with mma.sync: S = Q K^T and O += P V in the forward's words.
#pragma once

#include <cstdint>

#include "ptx/ldmatrix.cuh"
#include "ptx/mma.cuh"
#include "warp/accumulator.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn::mma {

// Where in a fragment this lane's address for ldmatrix_x4 points: lanes 8..15 address rows 8..15 for A
// operands and for transposed B (V), columns 8..15 for B (K); lanes 16..31 the other way round. A chunk is 8
// columns.
struct FragmentLane {
  int row;
  int chunk;

  __device__ static __forceinline__ FragmentLane of_a() {
    const int lane = lane_index();
    return {lane % 16, lane / 16};
  }
  __device__ static __forceinline__ FragmentLane of_b() {
    const int lane = lane_index();
    return {lane % 8 + lane / 16 * 8, lane / 8 % 2};
  }
};

// Element (i, j) becomes the product of row i of A and row j of B, both rows of kHeadDim elements in shared
// memory: S = Q K^T for a warp's share. The scores are zeroed here and not where they are declared: that
// allocates registers worse, 2 % of the time at head dim 64 under a causal mask.
template <Dtype kDtype, int kHeadDim, int kTilesM, int kTilesN>
__device__ __forceinline__ void multiply_rows(Accumulator<kTilesM, kTilesN>& scores, uint32_t a_address,
                                              uint32_t b_address) {
  using Shared = SharedTile<kHeadDim>;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int c = 0; c < 4; ++c) scores[m][n][c] = 0.0f;
    }
  }
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
      ptx::ldmatrix_x4(a[m], Shared::advance(a_address, 2 * k) + m * 16 * Shared::kRowBytes);
    }
    const uint32_t b_column = Shared::advance(b_address, 2 * k);
#pragma unroll
    for (int n = 0; n < kTilesN; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, b_column + n * 8 * Shared::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma_m16n8k16<kDtype>(scores[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<kDtype>(scores[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// O += P V for kSteps x 16 rows of V, kHeadDim elements each, with P rounded or still in fp32.
template <Dtype kDtype, int kHeadDim, int kSteps, class AnyProbs, int kTilesM, int kTilesD>
__device__ __forceinline__ void accumulate_output(Accumulator<kTilesM, kTilesD>& output,
                                                  const AnyProbs& probs, uint32_t value_address) {
  using Shared = SharedTile<kHeadDim>;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[kTilesM][4];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) get_operand<kDtype>(a[m], probs, m, k);
#pragma unroll
    for (int n = 0; n < kTilesD; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, Shared::advance(value_address, n) + k * 16 * Shared::kRowBytes);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        ptx::mma_m16n8k16<kDtype>(output[m][n], a[m], b[0], b[1]);
        ptx::mma_m16n8k16<kDtype>(output[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace flash_attn::mma
