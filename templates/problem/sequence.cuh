// Where the rows of a call lie: one batch entry's queries and keys, in fixed-length and varlen layouts, and
// the block of queries that a thread block computes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "abi.h"

namespace flash_attn {

struct Sequence {
  int q_row = 0;    // row of the first query, in rows from the start of its tensor (varlen) or batch entry
  int k_row = 0;    // the same for keys and values
  int q_batch = 0;  // batch index to multiply batch strides with: 0 for varlen
  int k_batch = 0;
  int seqlen_q = 0;
  int seqlen_k = 0;

  // Varlen launches one entry more than there are sequences: the rows past the last sequence, which see no
  // key.
  constexpr Sequence(const ForwardParams& params, int batch) {
    if (params.cu_seqlens_q == nullptr) {
      q_batch = k_batch = batch;
      seqlen_q = params.seqlen_q;
      seqlen_k = params.seqlen_k;
    } else {
      q_row = params.cu_seqlens_q[batch];
      if (batch == params.batch) {
        seqlen_q = static_cast<int>(params.total_q - q_row);
        return;
      }
      seqlen_q = params.cu_seqlens_q[batch + 1] - q_row;
      k_row = params.cu_seqlens_k[batch];
      seqlen_k = params.cu_seqlens_k[batch + 1] - k_row;
    }
    // Lengths on the device cannot be checked before the launch: one that exceeds the sequence is cut down to
    // it.
    if (params.seqused_k != nullptr) seqlen_k = clamp(params.seqused_k[batch], seqlen_k);
    if (params.leftpad_k != nullptr) {
      const int skipped = clamp(params.leftpad_k[batch], seqlen_k);
      k_row += skipped;
      seqlen_k -= skipped;
    }
  }

  static constexpr int clamp(int length, int limit) { return std::min(std::max(length, 0), limit); }

  // Rows of a head from `row` on, in a tensor that is laid out as Q, or as K.
  template <class Element>
  constexpr Element* query_rows(Element* tensor, int64_t batch_stride, int64_t row_stride,
                                int64_t head_stride, int head, int row) const {
    return tensor + q_batch * batch_stride + int64_t{q_row + row} * row_stride + head * head_stride;
  }
  template <class Element>
  constexpr Element* key_rows(Element* tensor, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                              int key_head, int row = 0) const {
    return tensor + k_batch * batch_stride + int64_t{k_row + row} * row_stride + key_head * head_stride;
  }

  template <class Element>
  constexpr const Element* q_rows(const ForwardParams& params, int head, int row) const {
    return query_rows(static_cast<const Element*>(params.q), params.q_batch_stride, params.q_row_stride,
                      params.q_head_stride, head, row);
  }
  template <class Element>
  constexpr const Element* k_rows(const ForwardParams& params, int key_head) const {
    return key_rows(static_cast<const Element*>(params.k), params.k_batch_stride, params.k_row_stride,
                    params.k_head_stride, key_head);
  }
  template <class Element>
  constexpr const Element* v_rows(const ForwardParams& params, int key_head) const {
    return key_rows(static_cast<const Element*>(params.v), params.v_batch_stride, params.v_row_stride,
                    params.v_head_stride, key_head);
  }
  template <class Element>
  constexpr Element* out_rows(const ForwardParams& params, int head, int row) const {
    return query_rows(static_cast<Element*>(params.out), params.out_batch_stride, params.out_row_stride,
                      params.out_head_stride, head, row);
  }
  constexpr float* lse_rows(const ForwardParams& params, int head, int row) const {
    return params.softmax_lse + q_batch * params.lse_batch_stride + head * params.lse_head_stride + q_row +
           row;
  }
};

// Calls function(row) for a thread block's tiles of `end` rows: the one at `first`, and every one `step` rows
// further. The rows past the last varlen sequence may be more than the tiles of the longest sequence. `first`
// decides on the type in which rows are counted.
template <class Index, class Function>
constexpr void for_each_tile(Index first, std::common_type_t<Index> step, std::common_type_t<Index> end,
                             Function function) {
  for (Index row = first; row < end; row += step) function(static_cast<int>(row));
}

// The rows [first_row, first_row + rows) of one head of one sequence. Where `group` query heads that share
// keys are packed, row i is query i / group of head `head` * group + i % group.
struct QueryBlock {
  const ForwardParams* params;
  Sequence sequence;
  int batch;
  int head;
  int group;
  int first_row;
  int rows;

  // A block of at most `max_rows` rows; `rows` is not positive if the sequence has none there.
  constexpr QueryBlock(const ForwardParams& params, const Sequence& sequence, int batch, int head, int group,
                       int first_row, int max_rows)
      : params(&params),
        sequence(sequence),
        batch(batch),
        head(head),
        group(group),
        first_row(first_row),
        rows(static_cast<int>(std::min(int64_t{sequence.seqlen_q} * group - first_row, int64_t{max_rows}))) {}

  // Row i of the block as a query of the sequence, and its head.
  constexpr int query_of(int i) const { return (first_row + i) / group; }
  constexpr int head_of(int i) const { return head_of(i, query_of(i)); }

  template <class Element>
  constexpr const Element* query(int i) const {
    const int row = query_of(i);
    return sequence.q_rows<Element>(*params, head_of(i, row), row);
  }
  template <class Element>
  constexpr Element* out(int i) const {
    const int row = query_of(i);
    return sequence.out_rows<Element>(*params, head_of(i, row), row);
  }
  constexpr float* lse(int i) const {
    const int row = query_of(i);
    return sequence.lse_rows(*params, head_of(i, row), row);
  }

  // Number of row i among the rows of all heads of all queries, heads running fastest.
  constexpr int64_t index(int i) const {
    const int row = query_of(i);
    const int64_t token = int64_t{sequence.q_batch} * params->seqlen_q + sequence.q_row + row;
    return token * params->num_heads + head_of(i, row);
  }

 private:
  constexpr int head_of(int i, int row) const { return head * group + first_row + i - row * group; }
};

// Sixteen bytes of zeros, which are stored at once.
struct alignas(16) ZeroChunk {
  uint32_t words[4] = {};
};

// Zeroes `chunks` x 8 elements of each of `rows` rows. Threads 0 .. threads - 1 share the work; `thread` is
// this one.
template <class Element>
constexpr void zero_rows(Element* first, int64_t row_stride, int64_t rows, int chunks, int64_t thread,
                         int64_t threads) {
#pragma unroll 1
  for (int64_t i = thread; i < rows * chunks; i += threads) {
    reinterpret_cast<ZeroChunk*>(first + i / chunks * row_stride)[i % chunks] = ZeroChunk{};
  }
}

// Rows that see no key: O = 0, LSE = +inf. Threads 0 .. threads - 1 share the work; `thread` is this one.
template <class Element>
constexpr void store_empty_rows(const QueryBlock& queries, int thread, int threads) {
  const int chunks = queries.params->head_dim_v / 8;
#pragma unroll 1
  for (int i = thread; i < queries.rows * chunks; i += threads) {
    *reinterpret_cast<ZeroChunk*>(queries.out<Element>(i / chunks) + i % chunks * 8) = ZeroChunk{};
  }
  if (queries.params->softmax_lse == nullptr) return;
#pragma unroll 1
  for (int row = thread; row < queries.rows; row += threads) {
    *queries.lse(row) = std::numeric_limits<float>::infinity();
  }
}

}  // namespace flash_attn
