// The choice of a kernel: the best family that the device can run and that this library holds.
#include "host/dispatch.h"

#include <cstring>

#include "host/status.h"

namespace flash_attn {
namespace {

// Machine code runs on its own major version from its own minor version on; PTX on everything that is newer.
bool runs_on(const FamilyTarget& target, int capability) {
  if (target.ptx && target.capability <= capability) return true;
  return target.capability / 10 == capability / 10 && target.capability <= capability;
}

bool family_runs_on(Family family, int capability) {
  for (int i = 0; i < kNumTargets; ++i) {
    if (kTargets[i].family == family && runs_on(kTargets[i], capability)) return true;
  }
  return false;
}

const FamilyInfo& family_info(Family family) {
  int i = 0;
  while (i < kNumFamilies && kFamilies[i].family != family) ++i;
  return kFamilies[i];  // the table ends with an uncounted entry
}

// The family with the largest tiles that the device was made for comes first; one made for larger devices
// comes last.
int preference(Family family, const Device& device) {
  const int shared_bytes = family_info(family).shared_bytes;
  return shared_bytes <= device.shared_bytes ? shared_bytes : -shared_bytes;
}

Mask mask_class(const ForwardParams& params) {
  if (params.window_left < 0 && params.window_right < 0) return Mask::kFull;
  return params.window_left < 0 && params.window_right == 0 ? Mask::kCausal : Mask::kWindowed;
}

int kernel_head_dim(int head_dim) {
  for (int i = 0; i < kNumHeadDims; ++i) {
    if (head_dim <= kHeadDims[i]) return kHeadDims[i];
  }
  return 0;
}

const char* mask_name(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "windowed";
}

}  // namespace

const KernelEntry* find_forward_kernel(const ForwardParams& params, const Device& device, Status& status) {
  const Dtype dtype = static_cast<Dtype>(params.dtype);
  const Family forced = static_cast<Family>(params.family);
  const Mask mask = mask_class(params);
  const int head_dim = kernel_head_dim(params.head_dim);
  const KernelEntry* best = nullptr;
  bool built = false;
  for (int i = 0; i < kNumKernels; ++i) {
    const KernelEntry& kernel = kKernels[i];
    if (kernel.direction != Direction::kForward || kernel.split || kernel.dtype != dtype ||
        kernel.mask != mask || kernel.head_dim != head_dim ||
        (forced != Family::kAuto && kernel.family != forced)) {
      continue;
    }
    built = true;
    if (!family_runs_on(kernel.family, device.capability) || kernel.shared_bytes > device.shared_bytes)
      continue;
    if (best == nullptr || preference(kernel.family, device) > preference(best->family, device))
      best = &kernel;
  }
  status = Status::kOk;
  if (best != nullptr) return best;
  status = built ? Status::kUnsupportedDevice : Status::kNotBuilt;
  fail(status,
       "this build holds no forward kernel for %s, head dim %d, %s mask, family %s%s that runs on compute "
       "capability %d.%d",
       dtype == Dtype::kBf16 ? "bf16" : "fp16", head_dim, mask_name(mask),
       forced == Family::kAuto ? "any" : family_info(forced).name, forced == Family::kAuto ? "" : " (forced)",
       device.capability / 10, device.capability % 10);
  return nullptr;
}

}  // namespace flash_attn
