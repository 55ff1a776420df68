// The two matrix products of the forward pass, S = Q K^T and O += P V, as one warpgroup issues them.
#pragma once

#include <cstdint>

#include "warp/accumulator.cuh"
#include "wgmma.cuh"
#include "wgmma/forward/config.cuh"

namespace flash_attn::wgmma {

// S = Q K^T for the 64 rows of Q at `query`.
template <class Config>
__device__ __forceinline__ void issue_scores(Accumulator<1, Config::kTilesN>& scores, uint32_t query,
                                             uint32_t key) {
  const uint64_t a = ptx::operand_descriptor(query, 16);
  const uint64_t b = ptx::operand_descriptor(key, 16);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Config::kHeadDim / 16; ++k) {
    ptx::Wgmma<Config::kBlockN>::template ss<Config::kDtype, 0>(
        scores, a + (k / 4 * Config::kQuerySlabBytes + k % 4 * 32) / 16,
        b + (k / 4 * Config::kKeySlabBytes + k % 4 * 32) / 16, k > 0);
  }
  ptx::wgmma_commit();
}

// O += P V; `probs` are A operands and must stay as they are until the products are done.
template <class Config>
__device__ __forceinline__ void issue_output(Accumulator<1, Config::kTilesD>& output,
                                             const RoundedProbs<1, Config::kTilesN>& probs, uint32_t value) {
  const uint64_t b = ptx::operand_descriptor(value, Config::kKeySlabBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < Config::kBlockN / 16; ++k) {
    ptx::Wgmma<Config::kHeadDimV>::template rs<Config::kDtype, 1>(output, probs[0][k], b + k * 16 * 128 / 16,
                                                                  1);
  }
  ptx::wgmma_commit();
}

}  // namespace flash_attn::wgmma
