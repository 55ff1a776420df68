// From CUDA's return codes to a Status.
#pragma once

#include <cuda_runtime.h>

#include "host/status.h"

namespace flash_attn {

// Errors of kernels while they run: CUDA returns them from whichever call comes later.
inline bool comes_late(cudaError_t code) {
  switch (code) {
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorMisalignedAddress:
      return true;
    default:
      return false;
  }
}

// Turns a CUDA return code into a Status; `call` and `kernel` are what failed. CUDA forgets the error, unless
// the context is lost: the caller's next check must not find it and blame another.
inline Status check_cuda(cudaError_t code, const char* call, const char* kernel) {
  if (code == cudaSuccess) return Status::kOk;
  cudaGetLastError();
  return fail(Status::kCudaError, "%s failed for %s: %s (%s)%s", call, kernel, cudaGetErrorString(code),
              cudaGetErrorName(code),
              comes_late(code)
                  ? "; kernels run asynchronously, so an earlier one may have failed, of flash_attn "
                    "or not: set CUDA_LAUNCH_BLOCKING=1 to see which"
                  : "");
}

}  // namespace flash_attn
