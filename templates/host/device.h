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

// Shared memory that the system takes for each resident thread block.
constexpr int kReservedSharedBytes = 1024;

// Whether a multiprocessor has shared memory for so many thread blocks at a time.
inline bool holds_blocks(const Device& device, int blocks, int shared_bytes) {
  return blocks * (shared_bytes + kReservedSharedBytes) <= device.shared_bytes_per_multiprocessor;
}

}  // namespace flash_attn
