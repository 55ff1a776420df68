// The tables of what this library holds, rendered into generated/dispatch.cu, and the choice among them.
#pragma once

#include <cuda_runtime.h>

#include "abi.h"
#include "host/launch.h"
#include "host/plan.h"

namespace flash_attn {

// A kernel of one direction, that of its table.
template <class Params>
struct Kernel {
  const char* key;
  Family family;
  Dtype dtype;
  int head_dim;
  Mask mask;
  int shared_bytes;
  Status (*launch)(const Params&, const Device&, cudaStream_t);
  typename PlannedTiles<Params>::Type tiles;
};

template <class Params>
struct KernelTable {
  Direction direction;
  const Kernel<Params>* kernels;
  int count;
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
  bool draws_tiles;  // some kernels do, from ForwardParams::tile_counter
};

extern const KernelTable<ForwardParams> kForwardKernels;
extern const KernelTable<BackwardParams> kBackwardKernels;
extern const KernelTable<CacheParams> kCacheKernels;
extern const FamilyTarget kTargets[];
extern const int kNumTargets;
extern const FamilyInfo kFamilies[];
extern const int kNumFamilies;
extern const int kHeadDims[];
extern const int kNumHeadDims;

// The family's row; that of an unknown family has the name "auto".
const FamilyInfo& family_info(Family family);

// Whether the family, or with kAuto any one of this library, draws tiles and can run on the device.
bool draws_tiles(const Device& device, Family family);

// The table's kernel for `params` on `device`, or null with the reason in `status` and
// flash_attn_last_error().
template <class Params>
const Kernel<Params>* find_kernel(const KernelTable<Params>& table, const ForwardParams& params,
                                  const Device& device, Status& status);

}  // namespace flash_attn
