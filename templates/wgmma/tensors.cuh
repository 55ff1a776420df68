// Q, K and V as the TMA unit sees them.
#pragma once

#include <cstdint>

#include "host/tensor_map.h"
#include "problem/query_block.cuh"
#include "problem/sequence.cuh"
#include "ptx/tensor_copy.cuh"
#include "wgmma/forward/config.cuh"

namespace flash_attn::wgmma {

// Read in boxes of 64 columns and the rows of a tile. K and V are (head_dim, row, head, batch), Q is
// (head_dim, head of a packed group, row, group, batch) so that a box holds the heads of a group for each of
// its rows.
struct TensorMaps {
  CUtensorMap q;
  CUtensorMap k;
  CUtensorMap v;
};

// The sizes of K and V, and the rows of a box of theirs.
struct KeyTensor {
  int64_t rows;
  int64_t batch;
  int box_rows;
};

template <class Config>
__device__ __forceinline__ void copy_queries(uint32_t shared, const CUtensorMap& map, uint32_t barrier,
                                             const QueryBlock& queries) {
#pragma unroll
  for (int slab = 0; slab < Config::kSlabs; ++slab) {
    ptx::copy_tensor(shared + slab * Config::kQuerySlabBytes, map, barrier, slab * 64, 0,
                     queries.sequence.q_row + queries.first_row / queries.group, queries.head,
                     queries.sequence.q_batch);
  }
}

template <class Config>
Status make_tensor_maps(TensorMaps& maps, const ForwardParams& params, const KeyTensor& keys, int group,
                        const char* name) {
  const bool varlen = params.cu_seqlens_q != nullptr;
  const int64_t batch = varlen ? 1 : params.batch, d = params.head_dim;
  const int64_t rows_q = varlen ? params.total_q : params.seqlen_q;
  // Without a single key nothing is read of K and V, but a tensor map wants an address and a size.
  const bool no_keys = keys.rows == 0 || keys.batch == 0;
  const int64_t rows_k = no_keys ? 1 : keys.rows, batch_k = no_keys ? 1 : keys.batch;
  const TensorBox q{
      params.q,
      5,
      {d, group, rows_q, params.num_heads / group, batch},
      {params.q_head_stride, params.q_row_stride, group * params.q_head_stride, params.q_batch_stride},
      {64, group, Config::kBlockM / group, 1, 1}};
  const TensorBox k{no_keys ? params.q : params.k,
                    4,
                    {d, rows_k, params.num_heads_k, batch_k},
                    {params.k_row_stride, params.k_head_stride, params.k_batch_stride},
                    {64, keys.box_rows, 1, 1}};
  const TensorBox v{no_keys ? params.q : params.v,
                    4,
                    {params.head_dim_v, rows_k, params.num_heads_k, batch_k},
                    {params.v_row_stride, params.v_head_stride, params.v_batch_stride},
                    {64, keys.box_rows, 1, 1}};
  Status status = make_tensor_map(maps.q, q, Config::kDtype, name);
  if (status == Status::kOk) status = make_tensor_map(maps.k, k, Config::kDtype, name);
  if (status == Status::kOk) status = make_tensor_map(maps.v, v, Config::kDtype, name);
  return status;
}

}  // namespace flash_attn::wgmma
