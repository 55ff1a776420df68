// The tables of what this library holds, rendered into generated/dispatch.cu, and the choice among them.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"
#include "host/device.h"

namespace flash_attn {

using ForwardLauncher = Status (*)(const ForwardParams&, const Device&, cudaStream_t);
using CacheLauncher = Status (*)(const CacheParams&, const Device&, cudaStream_t);
using BackwardLauncher = Status (*)(const BackwardParams&, const Device&, cudaStream_t);

struct KernelEntry {
  const char* key;
  Family family;
  Direction direction;
  Dtype dtype;
  int head_dim;
  Mask mask;
  int shared_bytes;
  ForwardLauncher launch_forward;  // null but for a forward kernel, and so on
  BackwardLauncher launch_backward;
  CacheLauncher launch_cache;
};

// Machine code (or, with ptx, intermediate code) for a compute capability, given as 10 * major + minor.
struct FamilyTarget {
  Family family;
  int capability;
  bool ptx;
};

struct FamilyInfo {
  Family family;
  const char* name;
  int shared_bytes;  // per thread block, on the devices that the family's tiles are made for
};

extern const KernelEntry kKernels[];
extern const int kNumKernels;
extern const FamilyTarget kTargets[];
extern const int kNumTargets;
extern const FamilyInfo kFamilies[];
extern const int kNumFamilies;
extern const int kHeadDims[];
extern const int kNumHeadDims;

// The family's row; that of an unknown family has the name "auto".
const FamilyInfo& family_info(Family family);

// The kernel for `params` on `device`, or null with the reason in `status` and flash_attn_last_error().
const KernelEntry* find_kernel(Direction direction, const ForwardParams& params, const Device& device,
                               Status& status);

}  // namespace flash_attn
