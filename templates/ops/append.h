// Appending new keys and values to a KV cache, and rotating queries and new keys.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"
#include "host/launch.h"

namespace flash_attn {

// Whether the call has anything to append or to rotate.
inline bool appends(const CacheParams& params) {
  return params.seqlen_new > 0 || params.rotary_cos != nullptr;
}

// Writes k_new and v_new into the cache, and q_rotated, where there is anything to; `attention` is what
// remains to be computed.
Status launch_append(const CacheParams& params, const Device& device, cudaStream_t stream,
                     CacheParams& attention);

}  // namespace flash_attn
