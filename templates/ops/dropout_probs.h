// Writes the attention probabilities with their dropout signs (S_dmask in the Python API).
#pragma once

#include <cuda_runtime.h>

#include "abi.h"

namespace flash_attn {

Status launch_dropout_probs(const ForwardParams& params, cudaStream_t stream);

}  // namespace flash_attn
