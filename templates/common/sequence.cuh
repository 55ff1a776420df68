// Where one batch entry's queries and keys lie, for fixed-length and varlen layouts.
#pragma once

#include <cstdint>

#include "abi.h"

namespace flash_attn {

struct Sequence {
  int64_t q_row;       // row of the first query, in rows from the start of its tensor (varlen) or batch entry
  int64_t k_row;       // the same for keys and values
  int64_t q_batch;     // batch index to multiply batch strides with: 0 for varlen
  int64_t k_batch;
  int seqlen_q;
  int seqlen_k;

  // Varlen launches one entry more than there are sequences: the rows past the last sequence, which see no key.
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
      seqlen_q = params.cu_seqlens_q[batch + 1] - static_cast<int>(q_row);
      k_row = params.cu_seqlens_k[batch];
      seqlen_k = params.cu_seqlens_k[batch + 1] - static_cast<int>(k_row);
    }
    if (params.seqused_k != nullptr) seqlen_k = params.seqused_k[batch];
    if (params.leftpad_k != nullptr) {
      k_row += params.leftpad_k[batch];
      seqlen_k = max(seqlen_k - params.leftpad_k[batch], 0);
    }
  }
};

}  // namespace flash_attn
