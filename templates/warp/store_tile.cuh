// Accumulators to global memory, through shared memory so that the stores are 16 bytes wide.
#pragma once

#include <cstdint>

#include "ptx/arithmetic.cuh"
#include "ptx/shared_memory.cuh"
#include "warp/accumulator.cuh"
#include "warp/shared_tile.cuh"

namespace flash_attn {

// Writes one warp's accumulators, each row times its `factor`, as 16-bit elements: row r, from `first_row`
// on, to row_pointer(r), as far as r < rows and the column, from `first_column` on, is below `columns`.
// `shared` is a tile of rows of kHeadDim elements, of which the warp overwrites its own part.
template <Dtype kDtype, int kHeadDim, int kTilesM, int kTilesN, class RowPointer>
__device__ __forceinline__ void store_tile(uint32_t shared, const Accumulator<kTilesM, kTilesN>& values,
                                           const float (&factor)[2 * kTilesM], int first_row,
                                           int first_column, int rows, int columns, RowPointer row_pointer) {
  using Shared = SharedTile<kHeadDim>;
  const int lane = lane_index();
#pragma unroll
  for (int i = 0; i < 2 * kTilesM; ++i) {
    const int row = first_row + fragment_row(i);
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
      const float* o = values[i / 2][n] + 2 * (i % 2);
      ptx::store_shared(shared + Shared::offset(row, first_column / 8 + n) + fragment_column() * 2,
                        ptx::pack<kDtype>(o[0] * factor[i], o[1] * factor[i]));
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * kTilesM * kTilesN; i += 32) {
    const int row = first_row + i / kTilesN, chunk = first_column / 8 + i % kTilesN;
    if (row >= rows || chunk * 8 >= columns) continue;
    *reinterpret_cast<uint4*>(row_pointer(row) + chunk * 8) =
        ptx::load_shared_16(shared + Shared::offset(row, chunk));
  }
}

}  // namespace flash_attn
