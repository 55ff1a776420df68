// What the producer and the consumers of a kernel share: the queue of tiles, positions in rings of buffers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "problem/schedule.cuh"
#include "ptx/shared_memory.cuh"

namespace flash_attn::wgmma {

// Position in a ring of buffers: the stage, and the parity of its full barrier's phase.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Hands out tiles to threads, one or a warp: the first one of each thread block is its own index, the next
// ones come from a counter in global memory, so that blocks with short tiles take more of them. Without a
// counter a block takes every gridDim.x-th tile.
template <int kThreads>
struct TileQueue {
  int32_t* counter;
  int num_tiles;

  __device__ __forceinline__ int next(int index) const {
    if (counter == nullptr) return index + gridDim.x;
    int taken = 0;
    if (kThreads == 1 || threadIdx.x == 0) {
      taken = atomicAdd(counter, 1);
      if (taken == num_tiles - 1) *counter = 0;  // every tile's successor has been asked for
    }
    if (kThreads > 1) taken = __shfl_sync(0xffffffff, taken, 0);
    return taken + gridDim.x;
  }
};

// The tile that the producer names to the consumers when there are no more.
__device__ __forceinline__ TileSchedule::Tile no_tile() { return {0, -1, 0}; }
__device__ __forceinline__ bool is_tile(const TileSchedule::Tile& tile) { return tile.batch >= 0; }

__device__ __forceinline__ void write_tile(uint32_t shared, const TileSchedule::Tile& tile) {
  ptx::store_shared_16(shared, make_uint4(tile.m_block, tile.batch, tile.head, tile.key_part));
}

__device__ __forceinline__ TileSchedule::Tile read_tile(uint32_t shared) {
  const uint4 fields = ptx::load_shared_16(shared);
  return {int(fields.x), int(fields.y), int(fields.z), int(fields.w)};
}

}  // namespace flash_attn::wgmma
