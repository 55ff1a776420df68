// A device's limits, and launching a kernel on it: on a one-dimensional grid, with every return code checked.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "abi.h"

namespace flash_attn {

// What the choice of a kernel and of its tile depends on.
struct Device {
  int index;
  int capability;    // 10 * major + minor
  int shared_bytes;  // that one thread block may have
  int shared_bytes_per_multiprocessor;
  int multiprocessors;
};

// Shared memory that the system takes for each resident thread block.
constexpr int kReservedSharedBytes = 1024;

// Whether a multiprocessor has shared memory for so many thread blocks at a time.
inline bool holds_blocks(const Device& device, int blocks, int shared_bytes) {
  return blocks * (shared_bytes + kReservedSharedBytes) <= device.shared_bytes_per_multiprocessor;
}

// Thread blocks of a backward that a multiprocessor runs at a time, at least one. Its threads take nearly all
// of the 255 registers that they can have, so that 8 warps fill the register file.
inline int resident_backward_blocks(const Device& device, int warps, int shared_bytes) {
  int blocks = std::max(8 / warps, 1);
  while (blocks > 1 && !holds_blocks(device, blocks, shared_bytes)) --blocks;
  return blocks;
}

// Calls `launch` with an object of the tile's type: Tiles::Roomy, which is for devices with more shared
// memory than the family counts on, where there is one and the device has it; else Tiles::Default.
template <class Tiles, class Function>
Status with_tile(const Device& device, Function launch) {
  using Roomy = typename Tiles::Roomy;
  if constexpr (!std::is_void_v<Roomy>) {
    if (holds_blocks(device, Roomy::Tile::kMinBlocks, Roomy::kSharedBytes)) return launch(Roomy{});
  }
  return launch(typename Tiles::Default{});
}

// Thread blocks of a grid, the product of sizes; the largest number if it overflows, which no grid can have.
inline int64_t grid_size(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return std::numeric_limits<int64_t>::max();
  }
  return product;
}

// How a kernel is launched; `name` is that of the error text.
struct Launch {
  const void* kernel;
  const char* name;
  int device;
  int64_t blocks;
  int threads;
  int shared_bytes;
  cudaStream_t stream;
  bool dependent;
};

// `prepared` remembers the devices on which the kernel's attributes are set.
Status launch_untyped(const Launch& launch, const void* arguments, std::atomic<uint64_t>& prepared);

// kOk if the thread blocks of a kernel, one per multiprocessor, can number `tiles` tiles among them.
Status check_tiles(const char* name, int64_t tiles, const Device& device);

// Launches on `device`, which must be current. `prepared` is one object per kernel. A `dependent` kernel, if
// its code can wait, may start before the one before it in the stream has ended; it must call
// ptx::wait_for_dependency() before it touches anything of that one.
template <class Arguments>
Status launch_kernel(void (*kernel)(Arguments), const char* name, int device, int64_t blocks, int threads,
                     int shared_bytes, cudaStream_t stream, const Arguments& arguments,
                     std::atomic<uint64_t>& prepared, bool dependent = false) {
  return launch_untyped(
      {reinterpret_cast<const void*>(kernel), name, device, blocks, threads, shared_bytes, stream, dependent},
      &arguments, prepared);
}

}  // namespace flash_attn
