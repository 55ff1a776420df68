// What the choice of a kernel and of its tile depends on.
#pragma once

namespace flash_attn {

struct Device {
  int index;
  int capability;    // 10 * major + minor
  int shared_bytes;  // that one thread block may have
  int shared_bytes_per_multiprocessor;
  int multiprocessors;
};

// Whether a kernel may be launched as dependent, see launch_kernel.
inline bool has_grid_dependencies(const Device& device) { return device.capability >= 90; }

// Shared memory that the system takes for each resident thread block.
constexpr int kReservedSharedBytes = 1024;

}  // namespace flash_attn
