// Rotary embedding of a tensor of its own: a thread rotates the same unit of several heads of a row, so that
// it reads the angles once and has several reads in flight.
#include "ops/rotary.h"

#include <algorithm>
#include <cstdint>

#include "host/launch.h"
#include "ops/rotary_unit.cuh"

namespace flash_attn {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;  // of a row that a thread rotates

struct RotaryArguments {
  RotaryParams params;
  int units;        // of a head that are rotated or copied
  int head_groups;  // of kHeads
};

struct RowPosition {
  int batch;
  int row;           // of the batch entry, or of all if packed
  int64_t position;  // in the tables; -1 past the last sequence

  __device__ __forceinline__ RowPosition(const RotaryParams& params, int64_t index) {
    if (params.cu_seqlens == nullptr) {
      batch = static_cast<int>(index / params.seqlen);
      row = static_cast<int>(index - int64_t{batch} * params.seqlen);
      position = row + offset(params, batch);
      return;
    }
    batch = 0;
    row = static_cast<int>(index);
    const int sequence = find_sequence(params.cu_seqlens, params.batch, row);
    position = sequence < 0 ? -1 : row - params.cu_seqlens[sequence] + offset(params, sequence);
  }

 private:
  __device__ static __forceinline__ int64_t offset(const RotaryParams& params, int sequence) {
    return params.offsets != nullptr ? params.offsets[sequence] : params.offset;
  }

  // The last sequence that starts at or before `row`, unless it ends there.
  __device__ static __forceinline__ int find_sequence(const int32_t* cu_seqlens, int batch, int row) {
    int low = 0, high = batch;  // cu_seqlens[low] <= row < cu_seqlens[high], unless past the last
    if (row >= cu_seqlens[batch] || row < cu_seqlens[0]) return -1;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (cu_seqlens[middle] <= row ? low : high) = middle;
    }
    return low;
  }
};

template <Dtype kDtype, class Table>
__global__ void __launch_bounds__(kThreads) rotary_kernel(const __grid_constant__ RotaryArguments arguments) {
  using Element = typename ptx::ElementOf<kDtype>::Type;
  const RotaryParams& params = arguments.params;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row_group = thread / arguments.units;
  const int unit = static_cast<int>(thread - row_group * arguments.units);
  const int64_t index = row_group / arguments.head_groups;
  const int head = static_cast<int>(row_group - index * arguments.head_groups) * kHeads;
  if (index >= params.rows) return;

  const RowPosition at(params, index);
  const bool inside = at.position >= 0 && at.position < params.table_rows;
  if (!inside && params.x == params.out) return;
  RotaryUnit<kDtype> rotary(unit, params.rotary_dim, params.interleaved != 0);
  const Element* x = static_cast<const Element*>(params.x) + at.batch * params.x_batch_stride +
                     at.row * params.x_row_stride + head * params.x_head_stride;
  Element* out = static_cast<Element*>(params.out) + at.batch * params.out_batch_stride +
                 at.row * params.out_row_stride + head * params.out_head_stride;
  typename RotaryUnit<kDtype>::Values values[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (head + i < params.num_heads) values[i] = rotary.load(x + i * params.x_head_stride);
  }
  if (inside && rotary.rotates()) {
    const int64_t angles = at.position * (params.rotary_dim / 2);
    rotary.load_angles(static_cast<const Table*>(params.cos) + angles,
                       static_cast<const Table*>(params.sin) + angles, params.conjugate != 0 ? -1.0f : 1.0f);
  } else {
    rotary.copy_only();
  }
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (head + i < params.num_heads) rotary.store(out + i * params.out_head_stride, values[i]);
  }
}

template <Dtype kDtype, class Table>
Status launch(const RotaryParams& params, cudaStream_t stream) {
  // In place, what is not rotated need not be touched.
  const int head_dim = params.x == params.out ? params.rotary_dim : params.head_dim;
  const int units = RotaryUnit<kDtype>::count(head_dim, params.rotary_dim, params.interleaved != 0);
  const int head_groups = (params.num_heads + kHeads - 1) / kHeads;
  const RotaryArguments arguments{params, std::max(units, 1), head_groups};
  const int64_t threads = params.rows * head_groups * units;
  static std::atomic<uint64_t> prepared;
  return launch_kernel(rotary_kernel<kDtype, Table>, "rotary", params.device,
                       (threads + kThreads - 1) / kThreads, kThreads, 0, stream, arguments, prepared);
}

template <Dtype kDtype>
Status launch_for(const RotaryParams& params, cudaStream_t stream) {
  return params.fp32_tables != 0 ? launch<kDtype, float>(params, stream)
                                 : launch<kDtype, typename ptx::ElementOf<kDtype>::Type>(params, stream);
}

}  // namespace

Status launch_rotary(const RotaryParams& params, cudaStream_t stream) {
  return static_cast<Dtype>(params.dtype) == Dtype::kBf16 ? launch_for<Dtype::kBf16>(params, stream)
                                                          : launch_for<Dtype::kFp16>(params, stream);
}

}  // namespace flash_attn
