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

}  // namespace flash_attn
