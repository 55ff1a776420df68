// A tile of 16-bit rows in shared memory, swizzled so that ldmatrix and 16-byte stores meet no bank conflict.
//
// Rows of kHeadDim elements lie one after the other in 16-byte chunks. Chunk c of row r is stored at chunk
// position c ^ (r % 8) where a row is a multiple of 128 bytes, and at c ^ (r / 2 % 4) where it is an odd
// multiple of 64 bytes: either way eight consecutive rows of one column of chunks cover all 32 banks.
#pragma once

#include <cstdint>

#include "ptx/async_copy.cuh"

namespace flash_attn {

template <int kHeadDim>
struct SharedTile {
  static_assert(kHeadDim % 32 == 0, "a row must be a multiple of 64 bytes");
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kSlabChunks = kHeadDim % 64 == 0 ? 8 : 4;  // chunks over which the swizzle permutes
  static constexpr int kSlabs = kHeadDim / 8 / kSlabChunks;
  static constexpr int kSlabBytes = kSlabChunks * 16;

  __device__ static __forceinline__ uint32_t swizzle(int row) {
    return kSlabChunks == 8 ? (row & 7) : ((row >> 1) & 3);
  }

  // Byte offset of `chunk` in `row`.
  __device__ static __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk / kSlabChunks) * kSlabBytes +
           (((chunk % kSlabChunks) ^ swizzle(row)) << 4);
  }

  // The address `chunks` further along the row than `start`: an exclusive or with a constant instead of the
  // whole computation. `chunks` must be even, `start` in the first two chunks of a slab of a tile aligned to
  // kSlabBytes.
  __device__ static __forceinline__ uint32_t advance(uint32_t start, int chunks) {
    return (start ^ ((chunks % kSlabChunks) << 4)) + (chunks / kSlabChunks) * kSlabBytes;
  }
};

// Copies tiles of `kRows` rows of a global matrix into a shared tile with cp.async, as `kThreads` threads.
// Rows from `valid_rows` on and columns from `valid_cols` on are filled with zeros, so that no stray NaN
// meets the tensor cores.
template <class Element, int kRows, int kHeadDim, int kThreads>
class TileCopy {
 public:
  // `global` is the first element of the first tile.
  __device__ __forceinline__ TileCopy(uint32_t shared, const Element* global, int64_t row_stride)
      : destination_(shared + Tile::offset(row(), chunk())),
        source_(global + row() * row_stride + chunk() * 8) {}

  // Moves the source on by this many tiles, which may be negative.
  __device__ __forceinline__ void move(int tiles, int64_t row_stride) {
    source_ += tiles * kRows * row_stride;
  }

  __device__ __forceinline__ void issue(int64_t row_stride, int valid_rows, int valid_cols) const {
#pragma unroll
    for (int pass = 0; pass < kRows / kRowsPerPass; ++pass) {
      const bool row_valid = row() + pass * kRowsPerPass < valid_rows;
#pragma unroll
      for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const bool valid = row_valid && (slab * Tile::kSlabChunks + chunk()) * 8 < valid_cols;
        ptx::cp_async_16(destination_ + pass * kRowsPerPass * Tile::kRowBytes + slab * Tile::kSlabBytes,
                         source_ + pass * kRowsPerPass * row_stride + slab * Tile::kSlabChunks * 8, valid);
      }
    }
  }

 private:
  using Tile = SharedTile<kHeadDim>;
  static constexpr int kRowsPerPass = kThreads / Tile::kSlabChunks;
  static_assert(kRows % kRowsPerPass == 0, "every thread copies the same number of chunks");
  static_assert(kRowsPerPass % 8 == 0, "a thread's rows must share one swizzle");

  __device__ static __forceinline__ int chunk() { return threadIdx.x % Tile::kSlabChunks; }
  __device__ static __forceinline__ int row() { return threadIdx.x / Tile::kSlabChunks; }

  uint32_t destination_;
  const Element* source_;
};

}  // namespace flash_attn
