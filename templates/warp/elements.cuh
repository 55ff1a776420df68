// Up to eight 16-bit elements at any address of theirs, an element at a time.
#pragma once

#include <cstdint>

namespace flash_attn {

// The first `count` elements, and zeros.
__device__ __forceinline__ uint4 load_elements(const void* from, int count) {
  const auto* elements = static_cast<const uint16_t*>(from);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? elements[2 * i] : 0;
    const uint32_t high = 2 * i + 1 < count ? elements[2 * i + 1] : 0;
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Writes the first `count` of them.
__device__ __forceinline__ void store_elements(void* to, uint4 values, int count) {
  auto* elements = static_cast<uint16_t*>(to);
  const uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) elements[i] = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
  }
}

}  // namespace flash_attn
