// The C ABI of libflash_attn.so: error text, device selection, and one function per operation.
#include <cuda_runtime.h>

#include <cstdarg>
#include <cstdio>
#include <string>
#include <unordered_map>

#include "host/check_cuda.h"
#include "host/check_params.h"
#include "host/dispatch.h"
#include "host/status.h"
#include "ops/dropout_probs.h"
#include "ops/rotary.h"

namespace flash_attn {
namespace {

thread_local char last_error[512] = "";

// Makes `device` current for the life of the object.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = check_cuda(cudaGetDevice(&previous_), "cudaGetDevice", "the call");
    if (status_ != Status::kOk || previous_ == device) return;
    status_ = check_cuda(cudaSetDevice(device), "cudaSetDevice", "the call");
    restore_ = status_ == Status::kOk;
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  Status status_ = Status::kOk;
};

Status query_device(int index, Device& device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                 {cudaDevAttrComputeCapabilityMinor, &minor},
                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device.shared_bytes},
                 {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device.shared_bytes_per_multiprocessor},
                 {cudaDevAttrMultiProcessorCount, &device.multiprocessors}};
  for (const auto& query : queries) {
    const Status status = check_cuda(cudaDeviceGetAttribute(query.value, query.attribute, index),
                                     "cudaDeviceGetAttribute", "the device");
    if (status != Status::kOk) return status;
  }
  device.index = index;
  device.capability = 10 * major + minor;
  return Status::kOk;
}

// A device's properties do not change: each thread asks once for each device it uses.
Status device_properties(int index, Device& device) {
  thread_local std::unordered_map<int, Device> known;
  const auto found = known.find(index);
  if (found != known.end()) {
    device = found->second;
    return Status::kOk;
  }
  const Status status = query_device(index, device);
  if (status == Status::kOk) known.emplace(index, device);
  return status;
}

const ForwardParams* forward_of(const ForwardParams* params) { return params; }

template <class Params>
const ForwardParams* forward_of(const Params* params) {
  return params == nullptr ? nullptr : &params->forward;
}

// The table's kernel for a call on its device, or null with the reason in `status`.
template <class Params>
const Kernel<Params>* kernel_for(const KernelTable<Params>& table, const ForwardParams& params,
                                 Device& device, Status& status) {
  status = device_properties(params.device, device);
  return status == Status::kOk ? find_kernel(table, params, device, status) : nullptr;
}

// Runs the table's kernel on parameters whose check gave `checked`.
template <class Params>
int32_t run(Status checked, const KernelTable<Params>& table, const Params* params, void* stream) {
  if (checked != Status::kOk) return static_cast<int32_t>(checked);
  Device device{};
  Status status;
  const Kernel<Params>* kernel = kernel_for(table, *forward_of(params), device, status);
  if (kernel == nullptr) return static_cast<int32_t>(status);
  const DeviceGuard guard(device.index);
  status = guard.status();
  if (status == Status::kOk) status = kernel->launch(*params, device, static_cast<cudaStream_t>(stream));
  return static_cast<int32_t>(status);
}

// The same of a kernel that no table holds.
template <class Params, class Launcher>
int32_t run_on_device(Status checked, Launcher launch, const Params* params, void* stream) {
  if (checked != Status::kOk) return static_cast<int32_t>(checked);
  const DeviceGuard guard(params->device);
  Status status = guard.status();
  if (status == Status::kOk) status = launch(*params, static_cast<cudaStream_t>(stream));
  return static_cast<int32_t>(status);
}

template <class Params>
const char* kernel_key(const char* function, const KernelTable<Params>& table, const Params* params) {
  const ForwardParams* forward = forward_of(params);
  Status status = check_choice(function, forward);
  if (status != Status::kOk) return nullptr;
  Device device{};
  const Kernel<Params>* kernel = kernel_for(table, *forward, device, status);
  return kernel == nullptr ? nullptr : kernel->key;
}

CachePlan make_plan(const CacheParams& params, const Kernel<CacheParams>& kernel, const Device& device) {
  return plan_cache(params, kernel.tiles, device.multiprocessors);
}

BackwardPlan make_plan(const BackwardParams& params, const Kernel<BackwardParams>& kernel,
                       const Device& device) {
  const int resident = resident_backward_blocks(device, kernel.tiles.warps, kernel.shared_bytes);
  return plan_backward(params, kernel.tiles, device.multiprocessors * resident);
}

// Writes the plan of a call whose check gave `checked`.
template <class Params, class Plan>
int32_t plan_call(Status checked, const KernelTable<Params>& table, const Params* params, Plan* plan) {
  if (checked != Status::kOk) return static_cast<int32_t>(checked);
  Device device{};
  Status status;
  const Kernel<Params>* kernel = kernel_for(table, *forward_of(params), device, status);
  if (kernel != nullptr) *plan = make_plan(*params, *kernel, device);
  return static_cast<int32_t>(status);
}

// The key of kernel `index` of the table; past its end null, and `index` counts on in the next table.
template <class Params>
const char* key_in(const KernelTable<Params>& table, int32_t& index) {
  if (index < table.count) return table.kernels[index].key;
  index -= table.count;
  return nullptr;
}

}  // namespace

Status fail(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace flash_attn

using namespace flash_attn;

int32_t flash_attn_forward(const ForwardParams* params, void* stream) {
  return run(check_forward(__func__, params), kForwardKernels, params, stream);
}

int32_t flash_attn_backward(const BackwardParams* params, void* stream) {
  return run(check_backward(__func__, params), kBackwardKernels, params, stream);
}

int32_t flash_attn_cache(const CacheParams* params, void* stream) {
  return run(check_cache(__func__, params), kCacheKernels, params, stream);
}

int32_t flash_attn_rotary(const RotaryParams* params, void* stream) {
  return run_on_device(check_rotary(__func__, params), launch_rotary, params, stream);
}

int32_t flash_attn_dropout_probs(const ForwardParams* params, void* stream) {
  return run_on_device(check_dropout_probs(__func__, params), launch_dropout_probs, params, stream);
}

const char* flash_attn_forward_kernel(const ForwardParams* params) {
  return kernel_key(__func__, kForwardKernels, params);
}

const char* flash_attn_backward_kernel(const BackwardParams* params) {
  return kernel_key(__func__, kBackwardKernels, params);
}

const char* flash_attn_cache_kernel(const CacheParams* params) {
  return kernel_key(__func__, kCacheKernels, params);
}

int32_t flash_attn_plan_backward(const BackwardParams* params, BackwardPlan* plan) {
  return plan_call(check_plan_backward(__func__, params, plan), kBackwardKernels, params, plan);
}

int32_t flash_attn_plan_cache(const CacheParams* params, CachePlan* plan) {
  return plan_call(check_plan_cache(__func__, params, plan), kCacheKernels, params, plan);
}

const char* flash_attn_last_error() { return last_error; }

uint64_t flash_attn_layout_hash() { return kLayoutHash; }

int64_t flash_attn_forward_params_size() { return sizeof(ForwardParams); }

int64_t flash_attn_backward_params_size() { return sizeof(BackwardParams); }

int64_t flash_attn_cache_params_size() { return sizeof(CacheParams); }

int64_t flash_attn_rotary_params_size() { return sizeof(RotaryParams); }

int32_t flash_attn_kernel_count() {
  return kForwardKernels.count + kBackwardKernels.count + kCacheKernels.count;
}

const char* flash_attn_kernel_key(int32_t index) {
  if (index < 0) return nullptr;
  const char* key = key_in(kForwardKernels, index);
  if (key == nullptr) key = key_in(kBackwardKernels, index);
  if (key == nullptr) key = key_in(kCacheKernels, index);
  return key;
}

int32_t flash_attn_draws_tiles(int32_t device, int32_t family) {
  Device properties{};
  if (device_properties(device, properties) != Status::kOk) return -1;
  return draws_tiles(properties, static_cast<Family>(family)) ? 1 : 0;
}

const char* flash_attn_targets() {
  static const std::string text = [] {
    std::string result;
    for (int i = 0; i < kNumTargets; ++i) {
      const FamilyTarget& target = kTargets[i];
      result += (i > 0 ? "," : "") + std::string(family_info(target.family).name) + ":" +
                std::to_string(target.capability) + (target.ptx ? "+ptx" : "");
    }
    return result;
  }();
  return text.c_str();
}
