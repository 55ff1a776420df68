#include "host/tensor_map.h"

#include <cuda_runtime.h>

#include <atomic>

#include "host/check_cuda.h"
#include "host/status.h"

namespace flash_attn {
namespace {

cudaError_t entry_point(const char* symbol, void** function, cudaDriverEntryPointQueryResult* result) {
#if CUDART_VERSION >= 12050
  return cudaGetDriverEntryPointByVersion(symbol, function, 12000, cudaEnableDefault, result);
#else
  return cudaGetDriverEntryPoint(symbol, function, cudaEnableDefault, result);
#endif
}

// The driver's function, asked for at run time so that the library loads without a driver.
Status tensor_map_encoder(decltype(&cuTensorMapEncodeTiled)& encoder, const char* name) {
  static std::atomic<void*> known{nullptr};
  void* found = known.load(std::memory_order_acquire);
  if (found == nullptr) {
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    const Status status = check_cuda(entry_point("cuTensorMapEncodeTiled", &found, &result),
                                     "cudaGetDriverEntryPoint(cuTensorMapEncodeTiled)", name);
    if (status != Status::kOk) return status;
    if (found == nullptr || result != cudaDriverEntryPointSuccess) {
      return fail(Status::kUnsupportedDevice, "%s needs a driver for CUDA 12.0 or newer", name);
    }
    known.store(found, std::memory_order_release);
  }
  encoder = reinterpret_cast<decltype(encoder)>(found);
  return Status::kOk;
}

}  // namespace

Status make_tensor_map(CUtensorMap& map, const TensorBox& tensor, Dtype dtype, const char* name) {
  decltype(&cuTensorMapEncodeTiled) encode;
  const Status status = tensor_map_encoder(encode, name);
  if (status != Status::kOk) return status;
  cuuint64_t size[TensorBox::kMaxRank], stride_bytes[TensorBox::kMaxRank - 1];
  cuuint32_t box[TensorBox::kMaxRank], step[TensorBox::kMaxRank];
  for (int i = 0; i < tensor.rank; ++i) {
    size[i] = tensor.size[i];
    box[i] = tensor.box[i];
    step[i] = 1;
    // The stride of a dimension of size 1 may be anything, but the driver checks it.
    if (i > 0) stride_bytes[i - 1] = tensor.size[i] == 1 ? 16 : 2 * tensor.stride[i - 1];
  }
  const CUresult result =
      encode(&map, dtype == Dtype::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             tensor.rank, const_cast<void*>(tensor.base), size, stride_bytes, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status::kOk;
  return fail(Status::kCudaError, "cuTensorMapEncodeTiled failed for %s: error %d", name,
              static_cast<int>(result));
}

}  // namespace flash_attn
