// Merging the partial results of a call whose keys several thread blocks share.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"
#include "host/launch.h"

namespace flash_attn {

// Writes out and softmax_lse from out_partial and lse_partial, which the kernel before in the stream writes.
Status launch_combine(const CacheParams& params, const Device& device, cudaStream_t stream);

}  // namespace flash_attn
