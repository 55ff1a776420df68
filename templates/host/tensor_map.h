// Descriptions of tensors for the TMA unit.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "abi.h"

namespace flash_attn {

// A tensor of 16-bit elements, innermost dimension first, and the box that one copy brings. Strides are in
// elements; that of dimension 0 is 1 and not given. Boxes are at most 64 elements wide and arrive with the
// 128-byte swizzle that wgmma reads.
struct TensorBox {
  static constexpr int kMaxRank = 5;
  const void* base;
  int rank;
  int64_t size[kMaxRank];
  int64_t stride[kMaxRank - 1];
  int box[kMaxRank];
};

// `name` is the kernel's, for the error text.
Status make_tensor_map(CUtensorMap& map, const TensorBox& tensor, Dtype dtype, const char* name);

}  // namespace flash_attn
