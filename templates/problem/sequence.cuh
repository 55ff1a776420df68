// Where one batch entry's queries and keys lie, for fixed-length and varlen layouts.
#pragma once

#include <cstdint>

#include "abi.h"

namespace flash_attn {

struct Sequence {
  int q_row;    // row of the first query, in rows from the start of its tensor (varlen) or batch entry
  int k_row;    // the same for keys and values
  int q_batch;  // batch index to multiply batch strides with: 0 for varlen
  int k_batch;
  int seqlen_q;
  int seqlen_k;

  // Varlen launches one entry more than there are sequences: the rows past the last sequence, which see no
  // key.
  __device__ Sequence(const ForwardParams& params, int batch) {
    if (params.cu_seqlens_q == nullptr) {
      q_row = 0;
      k_row = 0;
      q_batch = k_batch = batch;
      seqlen_q = params.seqlen_q;
      seqlen_k = params.seqlen_k;
    } else {
      q_batch = k_batch = 0;
      q_row = params.cu_seqlens_q[batch];
      if (batch == params.batch) {
        k_row = 0;
        seqlen_q = static_cast<int>(params.total_q - q_row);
        seqlen_k = 0;
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

  __device__ static int clamp(int length, int limit) { return min(max(length, 0), limit); }

  // Rows of a head from `row` on, in a tensor that is laid out as Q, or as K.
  template <class Element>
  __device__ Element* query_rows(Element* tensor, int64_t batch_stride, int64_t row_stride,
                                 int64_t head_stride, int head, int row) const {
    return tensor + q_batch * batch_stride + int64_t{q_row + row} * row_stride + head * head_stride;
  }
  template <class Element>
  __device__ Element* key_rows(Element* tensor, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                               int key_head, int row = 0) const {
    return tensor + k_batch * batch_stride + int64_t{k_row + row} * row_stride + key_head * head_stride;
  }

  template <class Element>
  __device__ const Element* q_rows(const ForwardParams& params, int head, int row) const {
    return query_rows(static_cast<const Element*>(params.q), params.q_batch_stride, params.q_row_stride,
                      params.q_head_stride, head, row);
  }

  template <class Element>
  __device__ const Element* k_rows(const ForwardParams& params, int key_head) const {
    return key_rows(static_cast<const Element*>(params.k), params.k_batch_stride, params.k_row_stride,
                    params.k_head_stride, key_head);
  }

  template <class Element>
  __device__ const Element* v_rows(const ForwardParams& params, int key_head) const {
    return key_rows(static_cast<const Element*>(params.v), params.v_batch_stride, params.v_row_stride,
                    params.v_head_stride, key_head);
  }

  template <class Element>
  __device__ Element* out_rows(const ForwardParams& params, int head, int row) const {
    return query_rows(static_cast<Element*>(params.out), params.out_batch_stride, params.out_row_stride,
                      params.out_head_stride, head, row);
  }

  __device__ float* lse_rows(const ForwardParams& params, int head, int row) const {
    return params.softmax_lse + q_batch * params.lse_batch_stride + head * params.lse_head_stride + q_row +
           row;
  }
};

}  // namespace flash_attn
