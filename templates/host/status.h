// Status codes and the text that goes with a failure.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"

namespace flash_attn {

// Stores a printf-style message for this thread's flash_attn_last_error() and returns `status`.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Turns a CUDA return code into a Status; `what` names the call and the kernel.
inline Status check_cuda(cudaError_t code, const char* call, const char* kernel) {
  if (code == cudaSuccess) return Status::kOk;
  return fail(Status::kCudaError, "%s failed for %s: %s (%s)", call, kernel, cudaGetErrorString(code),
              cudaGetErrorName(code));
}

}  // namespace flash_attn
