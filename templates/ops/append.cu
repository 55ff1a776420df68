// Writes new keys and values behind those that the cache holds; with rotary tables, rotates the keys on the
// way and writes rotated queries to a buffer. A row that would lie outside the cache is dropped.
#include "ops/append.h"

#include <algorithm>
#include <cstdint>

#include "host/launch.h"
#include "ops/rotary_unit.cuh"
#include "problem/kv_cache.cuh"
#include "ptx/grid_dependency.cuh"
#include "warp/elements.cuh"

namespace flash_attn {
namespace {

constexpr int kThreads = 128;

// Rows are heads of tokens: those of k_new and v_new, side by side, then those of q. Each has `units`.
struct AppendArguments {
  CacheParams params;
  int64_t new_rows;
  int64_t query_rows;
  int units;
  bool aligned;  // the cache is
};

// A row of the cache, or of rotated queries: nothing behind its end is written.
template <class Element>
struct Row {
  Element* data;
  int head_dim;
  bool aligned;

  // Writes eight elements from `first` on.
  __device__ __forceinline__ void operator()(int first, uint4 values) const {
    if (aligned) {
      *reinterpret_cast<uint4*>(data + first) = values;
    } else {
      store_elements(data + first, values, head_dim - first);
    }
  }
};

struct TokenHead {
  int batch;
  int token;
  int head;

  __device__ TokenHead(int64_t row, int tokens, int heads) {
    const int64_t batch_token = row / heads;
    batch = static_cast<int>(batch_token / tokens);
    token = static_cast<int>(batch_token - int64_t{batch} * tokens);
    head = static_cast<int>(row - batch_token * heads);
  }
};

// Rotates a unit of a head at `position`, or copies it where there are no tables or they end before.
template <Dtype kDtype, class Element>
__device__ __forceinline__ void write_rotated(const CacheParams& params, const Element* from,
                                              const Row<Element>& to, int unit, int position) {
  const bool interleaved = params.rotary_interleaved != 0;
  const int units = RotaryUnit<kDtype>::count(params.forward.head_dim, params.rotary_dim, interleaved);
  if (unit >= units) return;
  RotaryUnit<kDtype> rotary(unit, params.rotary_dim, interleaved);
  if (position < params.rotary_rows && rotary.rotates()) {
    const int64_t angles = int64_t{position} * (params.rotary_dim / 2);
    rotary.load_angles(static_cast<const Element*>(params.rotary_cos) + angles,
                       static_cast<const Element*>(params.rotary_sin) + angles, 1.0f);
  } else {
    rotary.copy_only();
  }
  rotary.store(rotary.load(from), to);
}

template <Dtype kDtype, class Element>
__device__ __forceinline__ void append(const CacheParams& params, bool aligned, int64_t row, int unit) {
  const ForwardParams& forward = params.forward;
  const TokenHead at(row, params.seqlen_new, forward.num_heads_k);
  const CachedSequence sequence(params, at.batch);
  const int position = sequence.length + at.token;
  if (position < sequence.k_row) return;
  const KeyLocation to = locate_key(params, sequence, position - sequence.k_row);
  if (to.page_or_batch < 0) return;
  const Element* k = static_cast<const Element*>(params.k_new) + at.batch * params.k_new_batch_stride +
                     at.token * params.k_new_row_stride + at.head * params.k_new_head_stride;
  Element* k_cache = static_cast<Element*>(const_cast<void*>(forward.k)) +
                     to.page_or_batch * forward.k_batch_stride + to.row * forward.k_row_stride +
                     at.head * forward.k_head_stride;
  write_rotated<kDtype, Element>(params, k, {k_cache, params.cache_head_dim, aligned}, unit, position);
  if (unit * 8 >= forward.head_dim_v) return;
  const Element* v = static_cast<const Element*>(params.v_new) + at.batch * params.v_new_batch_stride +
                     at.token * params.v_new_row_stride + at.head * params.v_new_head_stride;
  Element* v_cache = static_cast<Element*>(const_cast<void*>(forward.v)) +
                     to.page_or_batch * forward.v_batch_stride + to.row * forward.v_row_stride +
                     at.head * forward.v_head_stride;
  const Row<Element> v_row{v_cache, params.cache_head_dim_v, aligned};
  v_row(unit * 8, *reinterpret_cast<const uint4*>(v + unit * 8));
}

// With a full mask every query is rotated for the position of the first new key.
template <Dtype kDtype, class Element>
__device__ __forceinline__ void rotate_query(const CacheParams& params, int64_t row, int unit) {
  const ForwardParams& forward = params.forward;
  const TokenHead at(row, forward.seqlen_q, forward.num_heads);
  const CachedSequence sequence(params, at.batch);
  const bool by_position = forward.window_left >= 0 || forward.window_right >= 0;
  const Element* q = static_cast<const Element*>(forward.q) + at.batch * forward.q_batch_stride +
                     at.token * forward.q_row_stride + at.head * forward.q_head_stride;
  Element* rotated = static_cast<Element*>(params.q_rotated) + row * forward.head_dim;
  write_rotated<kDtype, Element>(params, q, {rotated, forward.head_dim, true}, unit,
                                 sequence.length + (by_position ? at.token : 0));
}

template <Dtype kDtype>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ AppendArguments arguments) {
  using Element = typename ptx::ElementOf<kDtype>::Type;
  ptx::launch_dependents();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row = i / arguments.units;
  const int unit = static_cast<int>(i - row * arguments.units);
  if (row < arguments.new_rows) {
    append<kDtype, Element>(arguments.params, arguments.aligned, row, unit);
  } else if (row < arguments.new_rows + arguments.query_rows) {
    rotate_query<kDtype, Element>(arguments.params, row - arguments.new_rows, unit);
  }
}

}  // namespace

Status launch_append(const CacheParams& params, const Device& device, cudaStream_t stream,
                     CacheParams& attention) {
  attention = params;
  if (!appends(params)) return Status::kOk;
  const ForwardParams& forward = params.forward;
  if (params.q_rotated != nullptr) {
    attention.forward.q = params.q_rotated;
    attention.forward.q_head_stride = forward.head_dim;
    attention.forward.q_row_stride = int64_t{forward.num_heads} * forward.head_dim;
    attention.forward.q_batch_stride = forward.seqlen_q * attention.forward.q_row_stride;
  }
  const int64_t batch = forward.batch;
  const int64_t new_rows = batch * params.seqlen_new * forward.num_heads_k;
  const int64_t query_rows = params.rotary_cos != nullptr ? batch * forward.seqlen_q * forward.num_heads : 0;
  const int units = std::max(forward.head_dim, forward.head_dim_v) / 8;
  const AppendArguments arguments{params, new_rows, query_rows, units, cache_aligned(params)};
  static std::atomic<uint64_t> prepared;
  return launch_kernel(static_cast<Dtype>(forward.dtype) == Dtype::kBf16 ? append_kernel<Dtype::kBf16>
                                                                         : append_kernel<Dtype::kFp16>,
                       "append", device.index, ((new_rows + query_rows) * units + kThreads - 1) / kThreads,
                       kThreads, 0, stream, arguments, prepared);
}

}  // namespace flash_attn
