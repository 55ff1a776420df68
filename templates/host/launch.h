// Launching a kernel on a one-dimensional grid with every return code checked.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>

#include "host/check_cuda.h"
#include "host/status.h"

namespace flash_attn {

// Allows `kernel` its dynamic shared memory on `device`, the current one, once per device and kernel.
inline Status allow_shared_memory(const void* kernel, const char* name, int device, int shared_bytes,
                                  std::atomic<uint64_t>& done) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (shared_bytes == 0 || (done.load(std::memory_order_acquire) & bit)) return Status::kOk;
  Status status =
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                 "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", name);
  if (status != Status::kOk) return status;
  status = check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared),
                      "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)", name);
  if (status == Status::kOk) done.fetch_or(bit, std::memory_order_release);
  return status;
}

// Whether a kernel's code can wait for the one before: it was compiled for sm_90 or later, which the device
// need not tell, since older PTX runs there too.
inline bool can_depend(const void* kernel, int device) {
  thread_local std::map<std::pair<const void*, int>, bool> known;
  const auto [entry, is_new] = known.try_emplace({kernel, device}, false);
  if (is_new) {
    cudaFuncAttributes attributes{};
    entry->second = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }
  return entry->second;
}

// Launches on `device`, which must be current. `done` remembers the devices on which the kernel's attributes
// are set: one object per kernel. A `dependent` kernel, if its code can wait, may start before the one before
// it in the stream has ended; it must call ptx::wait_for_dependency() before it touches anything of that one.
template <class Arguments>
Status launch_kernel(void (*kernel)(Arguments), const char* name, int device, int64_t blocks, int threads,
                     int shared_bytes, cudaStream_t stream, const Arguments& arguments,
                     std::atomic<uint64_t>& done, bool dependent = false) {
  if (blocks == 0) return Status::kOk;
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max()) {
    return fail(Status::kInvalidArgument, "%s would need %lld thread blocks; the limit is 2^31 - 1", name,
                static_cast<long long>(blocks));
  }
  const void* function = reinterpret_cast<const void*>(kernel);
  const Status status = allow_shared_memory(function, name, device, shared_bytes, done);
  if (status != Status::kOk) return status;
  void* kernel_arguments[] = {const_cast<Arguments*>(&arguments)};
  const dim3 grid(static_cast<unsigned>(blocks));
  if (!dependent || !can_depend(function, device)) {
    return check_cuda(cudaLaunchKernel(function, grid, dim3(threads), kernel_arguments, shared_bytes, stream),
                      "cudaLaunchKernel", name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return check_cuda(cudaLaunchKernelExC(&config, function, kernel_arguments), "cudaLaunchKernelExC", name);
}

}  // namespace flash_attn
