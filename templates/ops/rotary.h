// Rotary embedding of a tensor of its own.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"

namespace flash_attn {

Status launch_rotary(const RotaryParams& params, cudaStream_t stream);

}  // namespace flash_attn
