// The choice of a kernel: the best family that the device can run and that this library holds.
#include "host/dispatch.h"

#include <algorithm>
#include <cstdio>

#include "host/status.h"

namespace flash_attn {

const FamilyInfo& family_info(Family family) {
  int i = 0;
  while (i < kNumFamilies && kFamilies[i].family != family) ++i;
  return kFamilies[i];  // the table ends with an uncounted entry
}

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

// First the family made for the most shared memory that this device still has; last those made for more.
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

const char* direction_name(Direction direction) {
  return direction == Direction::kForward    ? "forward"
         : direction == Direction::kBackward ? "backward"
                                             : "split";
}

const char* mask_name(Mask mask) {
  return mask == Mask::kFull ? "full" : mask == Mask::kCausal ? "causal" : "windowed";
}

// What a call asks for, in the table's terms.
struct Wanted {
  Dtype dtype;
  int head_dim;
  Mask mask;
  Family family;  // kAuto: any

  Wanted(Direction direction, const ForwardParams& params)
      : dtype(static_cast<Dtype>(params.dtype)),
        head_dim(kernel_head_dim(std::max(params.head_dim, params.head_dim_v))),
        mask(direction == Direction::kSplit ? Mask::kWindowed : mask_class(params)),
        family(static_cast<Family>(params.family)) {}

  template <class Params>
  bool matches(const Kernel<Params>& kernel) const {
    return kernel.head_dim == head_dim && kernel.mask == mask && kernel.dtype == dtype &&
           (family == Family::kAuto || kernel.family == family);
  }
};

Status fail_without_kernel(Status status, Direction direction, const ForwardParams& params,
                           const Device& device) {
  char family[32] = "";
  if (params.family != 0) std::snprintf(family, sizeof(family), ", family sm%d (forced)", params.family);
  return fail(status,
              "this build holds no %s kernel for %s, head dim %d, %s mask%s that runs on compute capability "
              "%d.%d with %d bytes of shared memory; it was compiled for %s",
              direction_name(direction), static_cast<Dtype>(params.dtype) == Dtype::kBf16 ? "bf16" : "fp16",
              std::max(params.head_dim, params.head_dim_v), mask_name(mask_class(params)), family,
              device.capability / 10, device.capability % 10, device.shared_bytes, flash_attn_targets());
}

}  // namespace

bool draws_tiles(const Device& device, Family family) {
  for (int i = 0; i < kNumTargets; ++i) {
    const FamilyTarget& target = kTargets[i];
    if (family != Family::kAuto && family != target.family) continue;
    if (family_info(target.family).draws_tiles && runs_on(target, device.capability)) return true;
  }
  return false;
}

template <class Params>
const Kernel<Params>* find_kernel(const KernelTable<Params>& table, const ForwardParams& params,
                                  const Device& device, Status& status) {
  const Wanted wanted(table.direction, params);
  const Kernel<Params>* best = nullptr;
  bool too_large = false;
  for (int i = 0; i < table.count; ++i) {
    const Kernel<Params>& kernel = table.kernels[i];
    if (!wanted.matches(kernel) || !family_runs_on(kernel.family, device.capability)) continue;
    if (kernel.shared_bytes > device.shared_bytes) {
      too_large = true;
    } else if (best == nullptr || preference(kernel.family, device) > preference(best->family, device)) {
      best = &kernel;
    }
  }
  status = Status::kOk;
  if (best == nullptr) {
    const Status reason = too_large ? Status::kUnsupportedDevice : Status::kNotBuilt;
    status = fail_without_kernel(reason, table.direction, params, device);
  }
  return best;
}

template const Kernel<ForwardParams>* find_kernel(const KernelTable<ForwardParams>&, const ForwardParams&,
                                                  const Device&, Status&);
template const Kernel<BackwardParams>* find_kernel(const KernelTable<BackwardParams>&, const ForwardParams&,
                                                   const Device&, Status&);
template const Kernel<CacheParams>* find_kernel(const KernelTable<CacheParams>&, const ForwardParams&,
                                                const Device&, Status&);

}  // namespace flash_attn
