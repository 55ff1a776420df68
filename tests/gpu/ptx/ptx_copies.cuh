// Moves boxes of a tensor through shared memory as a producer and its consumers do.
#pragma once

#include <cstdint>

#include "host/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "wgmma.cuh"

namespace flash_attn {

// What to copy, as test_ptx.py writes it: `boxes` groups of `slabs` boxes, the first at `start`.
struct Copies {
  uint4* out;  // (boxes, slabs, rows, 64) elements
  int start[TensorBox::kMaxRank];
  int boxes, slabs;
  int rows;  // of a box: the product of its outer dimensions, a multiple of 8
  int step;  // from one group to the next in the dimension of rows, the last but two
};

struct CopyArguments {
  CUtensorMap map;
  Copies copies;
};

template <int kRank>
__device__ void copy_slabs(const CopyArguments& arguments, uint32_t shared, uint32_t barrier, int box) {
  const Copies& copies = arguments.copies;
  const int *start = copies.start, row = start[kRank - 3] + box * copies.step;
  for (int slab = 0; slab < copies.slabs; ++slab, shared += copies.rows * 128) {
    const int column = start[0] + slab * 64;
    if constexpr (kRank == 4) {
      ptx::copy_tensor(shared, arguments.map, barrier, column, row, start[2], start[3]);
    } else {
      ptx::copy_tensor(shared, arguments.map, barrier, column, start[1], row, start[3], start[4]);
    }
  }
}

// Undoes the swizzle: chunk c of row r is stored at c ^ (r % 8).
__device__ void store_slabs(const Copies& copies, uint32_t shared, int box) {
  const int chunks = copies.rows * copies.slabs * 8;
  for (int i = threadIdx.x; i < chunks; i += 128) {
    copies.out[box * chunks + (i ^ i / 8 % 8)] = ptx::load_shared_16(shared + 16 * i);
  }
}

// 128 consumers, then a warp whose first thread produces; one buffer, used again and again.
template <int kRank>
__global__ void __launch_bounds__(160) copy_kernel(const __grid_constant__ CopyArguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  const int bytes = arguments.copies.slabs * arguments.copies.rows * 128;
  const uint32_t full = shared + bytes, empty = full + 8;
  // NaN, so that what a copy leaves out does not pass for zeros.
  for (int i = threadIdx.x; i < bytes / 4; i += 160) ptx::store_shared(shared + 4 * i, 0xffffffff);
  ptx::fence_async_proxy();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 128);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  for (int box = 0; box < arguments.copies.boxes; ++box) {
    if (threadIdx.x < 128) {
      ptx::mbarrier_wait(full, box % 2);
      store_slabs(arguments.copies, shared, box);
      ptx::mbarrier_arrive(empty);
    } else if (threadIdx.x == 128) {
      ptx::mbarrier_wait(empty, box % 2 ^ 1);
      ptx::mbarrier_arrive_expect(full, bytes);
      copy_slabs<kRank>(arguments, shared, full, box);
    }
  }
}

}  // namespace flash_attn
