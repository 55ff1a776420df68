// Dropout by counter: the random bits of a score depend on its coordinates and the generator's state alone,
// never on tiles, so that forward, backward and other implementations of Philox agree on the mask.
//
// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). One call serves eight
// scores of an aligned 16x16 block: those that one lane holds in the accumulators of two neighbouring
// mma.sync tiles.
#pragma once

#include <cstdint>

#include "abi.h"

namespace flash_attn {

__device__ __forceinline__ uint4 philox_4x32_7(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
    counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

struct Dropout {
  uint2 key;
  uint32_t batch_head;
  uint32_t offset;
  uint32_t keep_below;  // a 16-bit number below this keeps its score

  __device__ __forceinline__ Dropout(const ForwardParams& params, int batch_head)
      : batch_head(batch_head),
        keep_below(static_cast<uint32_t>((1.0f - params.dropout_p) * 65536.0f + 0.5f)) {
    const uint64_t seed = params.rng_state[0];
    key = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    offset = static_cast<uint32_t>(params.rng_state[1]);
  }

  // Random words of the eight scores that `lane` holds in the 16x16 block (row_block, col_block). The word of
  // tile t and row half h is component 2 t + h: its low half belongs to the even column, its high half to the
  // odd one.
  __device__ __forceinline__ uint4 words(int row_block, int col_block, int lane) const {
    const uint4 counter =
        make_uint4(static_cast<uint32_t>(row_block) << 5 | lane, col_block, batch_head, offset);
    return philox_4x32_7(counter, key);
  }

  __device__ __forceinline__ bool keeps(uint32_t word, int parity) const {
    return (parity == 0 ? word & 0xffffu : word >> 16) < keep_below;
  }
};

}  // namespace flash_attn
