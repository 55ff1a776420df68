// Launching a kernel on a one-dimensional grid with every return code checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>

#include "host/status.h"

namespace flash_attn {

// Allows `kernel` its dynamic shared memory on the current device, once per device and kernel.
inline Status allow_shared_memory(const void* kernel, const char* name, int shared_bytes,
                                  std::atomic<uint64_t>& done) {
  if (shared_bytes == 0) return Status::kOk;
  int device = 0;
  Status status = check_cuda(cudaGetDevice(&device), "cudaGetDevice", name);
  if (status != Status::kOk) return status;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (done.load(std::memory_order_acquire) & bit) return Status::kOk;
  status = check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                      "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", name);
  if (status != Status::kOk) return status;
  status = check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared),
                      "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)", name);
  if (status == Status::kOk) done.fetch_or(bit, std::memory_order_release);
  return status;
}

// `done` remembers the devices on which the kernel's attributes are set: one object per kernel.
template <class Arguments>
Status launch_kernel(void (*kernel)(Arguments), const char* name, int64_t blocks, int threads,
                     int shared_bytes, cudaStream_t stream, const Arguments& arguments,
                     std::atomic<uint64_t>& done) {
  if (blocks == 0) return Status::kOk;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    return fail(Status::kInvalidArgument, "%s would need %lld thread blocks; the limit is 2^31 - 1", name,
                static_cast<long long>(blocks));
  }
  const void* function = reinterpret_cast<const void*>(kernel);
  const Status status = allow_shared_memory(function, name, shared_bytes, done);
  if (status != Status::kOk) return status;
  void* kernel_arguments[] = {const_cast<Arguments*>(&arguments)};
  return check_cuda(cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads),
                                     kernel_arguments, shared_bytes, stream),
                    "cudaLaunchKernel", name);
}

}  // namespace flash_attn
