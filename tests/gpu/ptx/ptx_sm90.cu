// The Hopper wrappers of templates/ptx without the attention around them, for test_ptx.py: copies
// (ptx_copies.cuh) and, here, the products S += Q K^T and O += round(S) V of one thread block.
#include <cuda_runtime.h>

#include <atomic>
#include <chrono>
#include <cstdarg>
#include <cstdio>

#include "host/check_cuda.h"
#include "host/launch.h"
#include "host/tensor_map.h"
#include "ptx/barrier.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx_copies.cuh"
#include "warp/accumulator.cuh"
#include "wgmma.cuh"
#include "wgmma/products.cuh"

namespace flash_attn {

char last_error[512];

Status fail(Status status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(last_error, sizeof(last_error), format, values);
  va_end(values);
  return status;
}

// Launches one block and waits, but not for ever: a barrier used wrongly may never complete.
template <class Arguments>
Status run(void (*kernel)(Arguments), int threads, int shared_bytes, const Arguments& arguments) {
  std::atomic<uint64_t> prepared{0};
  Status status = launch_kernel(kernel, "test", 0, 1, threads, shared_bytes, nullptr, arguments, prepared);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (status == Status::kOk) {
    const cudaError_t state = cudaStreamQuery(nullptr);
    if (state != cudaErrorNotReady) return check_cuda(state, "the kernel", "test");
    if (std::chrono::steady_clock::now() > deadline) return fail(Status::kCudaError, "the kernel hangs");
  }
  return status;
}

// As test_ptx.py writes it. Without `accumulate` the accumulators start as the poison in these matrices.
struct Products {
  const void* base[3];    // Q, K and V
  int64_t row_stride[3];  // theirs
  float* scores;          // (64, keys)
  float* output;          // (64, width)
  int keys, depth, width, specialised, accumulate;
  int used_keys;  // the rows of V from here on are overwritten with zeros in shared memory
};

// Q is (64, depth), K (keys, depth), V (keys, width). Specialised: a warpgroup copies, another one computes.
template <Dtype dtype, int keys, int depth, int width, bool specialised = false>
struct Case {
  static constexpr Dtype kDtype = dtype;
  static constexpr int kKeys = keys, kDepth = depth, kWidth = width, kTilesN = keys / 8;
  static constexpr bool kSpecialised = specialised;
  static bool is(const Products& call) {
    return call.keys == keys && call.depth == depth && call.width == width && call.specialised == specialised;
  }
  static constexpr int kSlabs = (depth + 63) / 64, kSlabsV = (width + 63) / 64;
  static constexpr int kQuerySlabBytes = 64 * 128, kKeySlabBytes = keys * 128;
  // Shared memory: Q | K | V | O of a specialised kernel | barrier.
  static constexpr int kKeyAt = kSlabs * kQuerySlabBytes;
  static constexpr int kValueAt = kKeyAt + kSlabs * kKeySlabBytes;
  static constexpr int kOutputAt = kValueAt + kSlabsV * kKeySlabBytes;
  static constexpr int kBarrierAt = kOutputAt + (specialised ? 64 * width * 4 : 0);
  static constexpr int kSharedBytes = kBarrierAt + 16;
  static constexpr int kThreads = specialised ? 256 : 128;
};

struct ProductsArguments {
  CUtensorMap q, k, v;
  Products call;
};

template <class Case>
__device__ void load(const ProductsArguments& arguments, uint32_t shared) {
  const uint32_t barrier = shared + Case::kBarrierAt;
  ptx::mbarrier_arrive_expect(barrier, Case::kOutputAt);
  const auto copy = [&](uint32_t to, const CUtensorMap& map, int slabs, int slab_bytes) {
    for (int i = 0; i < slabs; ++i) ptx::copy_tensor(to + i * slab_bytes, map, barrier, i * 64, 0, 0, 0);
  };
  copy(shared, arguments.q, Case::kSlabs, Case::kQuerySlabBytes);
  copy(shared + Case::kKeyAt, arguments.k, Case::kSlabs, Case::kKeySlabBytes);
  copy(shared + Case::kValueAt, arguments.v, Case::kSlabsV, Case::kKeySlabBytes);
}

// Calls function(element of the warpgroup's accumulator, its place in a row-major matrix).
template <int kTiles, class Function>
__device__ __forceinline__ void for_each(Accumulator<1, kTiles>& accumulator, float* matrix,
                                         Function function) {
  for_each_score(accumulator, threadIdx.x % 128 / 32 * 16, 0, [&](float& element, int row, int column) {
    function(element, matrix[row * kTiles * 8 + column]);
  });
}

// Ordinary writes that the products must see, as in wgmma/forward/kernel.cuh.
template <class Case>
__device__ __forceinline__ void zero_values(uint32_t value, int used_keys) {
  for (int i = threadIdx.x % 128; i < Case::kSlabsV * Case::kKeys * 8; i += 128) {
    if (i / 8 % Case::kKeys >= used_keys) ptx::store_shared_16(value + i * 16, make_uint4(0, 0, 0, 0));
  }
  ptx::fence_async_proxy();
  ptx::barrier_sync(1, 128);
}

template <class Case>
__device__ __forceinline__ void compute(const Products& call, uint32_t shared, float* output_matrix) {
  const auto get = [](float& element, float& place) { element = place; };
  const auto put = [](float& element, float& place) { place = element; };
  Accumulator<1, Case::kKeys / 8> scores;
  Accumulator<1, Case::kWidth / 8> output;
  RoundedProbs<1, Case::kKeys / 8> probs;
  for_each(scores, call.scores, get);
  ptx::mbarrier_wait(shared + Case::kBarrierAt, 0);

  const uint64_t query = ptx::operand_descriptor(shared, 16);
  const uint64_t key = ptx::operand_descriptor(shared + Case::kKeyAt, 16);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Case::kDepth / 16; ++k) {
    ptx::Wgmma<Case::kKeys>::template ss<Case::kDtype, 0>(
        scores, query + (k / 4 * Case::kQuerySlabBytes + k % 4 * 32) / 16,
        key + (k / 4 * Case::kKeySlabBytes + k % 4 * 32) / 16, k > 0 || call.accumulate);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(scores);
  for_each(scores, call.scores, put);
  round_probs<Case::kDtype>(probs, scores);

  zero_values<Case>(shared + Case::kValueAt, call.used_keys);
  for_each(output, output_matrix, get);
  const uint64_t value = ptx::operand_descriptor(shared + Case::kValueAt, Case::kKeySlabBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Case::kKeys / 16; ++k) {
    ptx::Wgmma<Case::kWidth>::template rs<Case::kDtype, 1>(output, probs[0][k], value + k * 16 * 128 / 16,
                                                           k > 0 || call.accumulate);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::settle(output);
  for_each(output, output_matrix, put);
}

// O passes through shared memory, from and to the producer warpgroup: nothing but the named barriers 2 and 3
// orders that. 128 registers per thread become 40 and 216; the latter are needed.
template <class Case>
__device__ __forceinline__ void compute_specialised(const ProductsArguments& arguments, uint32_t shared,
                                                    float* staged) {
  float* output = arguments.call.output;
  if (__shfl_sync(0xffffffff, threadIdx.x / 128, 0) == 0) {
    ptx::give_registers<40>();
    if (threadIdx.x == 0) load<Case>(arguments, shared);
    for (int i = threadIdx.x; i < 64 * Case::kWidth; i += 128) staged[i] = output[i];
    ptx::barrier_arrive(2, 256);
    ptx::barrier_sync(3, 256);
    for (int i = threadIdx.x; i < 64 * Case::kWidth; i += 128) output[i] = staged[i];
  } else {
    ptx::take_registers<216>();
    ptx::barrier_sync(2, 256);
    compute<Case>(arguments.call, shared, staged);
    ptx::barrier_arrive(3, 256);
  }
}

template <class Case>
__global__ void __launch_bounds__(Case::kThreads, Case::kSpecialised ? 2 : 1)
    products_kernel(const __grid_constant__ ProductsArguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  const uint32_t shared = ptx::shared_address(shared_memory);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared + Case::kBarrierAt, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (Case::kSpecialised) {
    compute_specialised<Case>(arguments, shared, reinterpret_cast<float*>(shared_memory + Case::kOutputAt));
  } else {
    if (threadIdx.x == 0) load<Case>(arguments, shared);
    compute<Case>(arguments.call, shared, arguments.call.output);
  }
}

template <class Case>
Status run_products(const Products& call) {
  ProductsArguments arguments{{}, {}, {}, call};
  CUtensorMap* maps[] = {&arguments.q, &arguments.k, &arguments.v};
  const int rows[] = {64, call.keys, call.keys}, columns[] = {call.depth, call.depth, call.width};
  for (int i = 0; i < 3; ++i) {
    const TensorBox box{
        call.base[i], 4, {columns[i], rows[i], 1, 1}, {call.row_stride[i], 0, 0}, {64, rows[i], 1, 1}};
    const Status status = make_tensor_map(*maps[i], box, Case::kDtype, "test");
    if (status != Status::kOk) return status;
  }
  return run(products_kernel<Case>, Case::kThreads, Case::kSharedBytes, arguments);
}

template <class... Cases>
Status run_case(const Products& call) {
  Status status = fail(Status::kInvalidArgument, "no kernel was compiled for this case");
  ((Cases::is(call) && (status = run_products<Cases>(call), true)) || ...);
  return status;
}

// Every width of wgmma.cuh once as that of S and once as that of O.
template <Dtype t>
Status run_dtype(const Products& call) {
  return run_case<Case<t, 32, 64, 256>, Case<t, 64, 128, 192>, Case<t, 80, 96, 128>, Case<t, 96, 64, 96>,
                  Case<t, 128, 128, 80>, Case<t, 192, 32, 64>, Case<t, 256, 128, 32>,
                  Case<t, 128, 128, 192, true>>(call);
}

const char* error_text(Status status) { return status == Status::kOk ? nullptr : last_error; }

// Both return the text of an error, or null.
extern "C" const char* copy_boxes(const TensorBox& tensor, Dtype dtype, const Copies& copies) {
  CopyArguments arguments{{}, copies};
  const Status status = make_tensor_map(arguments.map, tensor, dtype, "test");
  if (status != Status::kOk) return error_text(status);
  const int shared_bytes = copies.slabs * copies.rows * 128 + 16;
  return error_text(run(tensor.rank == 4 ? copy_kernel<4> : copy_kernel<5>, 160, shared_bytes, arguments));
}

extern "C" const char* multiply(const Products& call, Dtype dtype) {
  return error_text(dtype == Dtype::kBf16 ? run_dtype<Dtype::kBf16>(call) : run_dtype<Dtype::kFp16>(call));
}

}  // namespace flash_attn
