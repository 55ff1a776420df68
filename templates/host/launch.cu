#include "host/launch.h"

#include <limits>
#include <map>
#include <utility>

#include "host/check_cuda.h"
#include "host/status.h"

namespace flash_attn {
namespace {

// Allows a kernel its dynamic shared memory on its device, the current one, once per device and kernel.
Status allow_shared_memory(const Launch& launch, std::atomic<uint64_t>& prepared) {
  const uint64_t bit = launch.device < 64 ? uint64_t{1} << launch.device : 0;
  if (launch.shared_bytes == 0 || (prepared.load(std::memory_order_acquire) & bit)) return Status::kOk;
  Status status = check_cuda(
      cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes),
      "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)", launch.name);
  if (status != Status::kOk) return status;
  status = check_cuda(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                           cudaSharedmemCarveoutMaxShared),
                      "cudaFuncSetAttribute(PreferredSharedMemoryCarveout)", launch.name);
  if (status == Status::kOk) prepared.fetch_or(bit, std::memory_order_release);
  return status;
}

// Whether the kernel contains the instruction, i.e. was compiled for sm_90 or later. The device does not
// answer that: it also runs code made from older PTX.
bool can_depend(const void* kernel, int device) {
  thread_local std::map<std::pair<const void*, int>, bool> known;
  const auto [entry, is_new] = known.try_emplace({kernel, device}, false);
  if (is_new) {
    cudaFuncAttributes attributes{};
    entry->second = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }
  return entry->second;
}

}  // namespace

Status check_tiles(const char* name, int64_t tiles, const Device& device) {
  if (tiles <= std::numeric_limits<int32_t>::max() - device.multiprocessors) return Status::kOk;
  return fail(Status::kInvalidArgument, "%s would need %lld tiles; the limit is 2^31 - 1 less one per SM",
              name, static_cast<long long>(tiles));
}

Status launch_untyped(const Launch& launch, const void* arguments, std::atomic<uint64_t>& prepared) {
  if (launch.blocks == 0) return Status::kOk;
  if (launch.blocks < 0 || launch.blocks > std::numeric_limits<int32_t>::max()) {
    return fail(Status::kInvalidArgument, "%s would need %lld thread blocks; the limit is 2^31 - 1",
                launch.name, static_cast<long long>(launch.blocks));
  }
  const Status status = allow_shared_memory(launch, prepared);
  if (status != Status::kOk) return status;
  void* kernel_arguments[] = {const_cast<void*>(arguments)};
  const dim3 grid(static_cast<unsigned>(launch.blocks)), block(launch.threads);
  if (!launch.dependent || !can_depend(launch.kernel, launch.device)) {
    return check_cuda(
        cudaLaunchKernel(launch.kernel, grid, block, kernel_arguments, launch.shared_bytes, launch.stream),
        "cudaLaunchKernel", launch.name);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return check_cuda(cudaLaunchKernelExC(&config, launch.kernel, kernel_arguments), "cudaLaunchKernelExC",
                    launch.name);
}

}  // namespace flash_attn
