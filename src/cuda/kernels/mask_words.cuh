#pragma once

#include "cuda/kernels/device.cuh"

// A boolean mask, read once: 32 keys become a bit each of a word, an eighth of the bytes for the kernels that ask for
// them once a head.  Words of the same keys lie row by row, so that the eight rows of a warp are neighbours.  Whole
// tiles that are hidden or visible are found on the way.
namespace fovea::cuda {

/// Blocks: x: 32 words of 32 rows; y: sequences × heads that have a mask of their own, some of them at once.
template <ForwardSpec S>
__device__ void mask_words(const CallParams& p) {
  __shared__ u32 words[kWarp][kWarp + 1], facts[2];  // a lane for each word, then for each row
  const WordView& to = p.mask_words;
  const int span = static_cast<int>(blockIdx.x) % to.spans(), group = static_cast<int>(blockIdx.x) / to.spans();
  const int first_word = span * kWarp, first_row = group * kWarp;
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x < 2) facts[threadIdx.x] = 0;
  for (int plane = static_cast<int>(blockIdx.y); plane < to.planes; plane += static_cast<int>(gridDim.y)) {
    const char* const from = p.mask.data + plane / to.heads * p.mask.batch + plane % to.heads * p.mask.head;
    for (int r = warp_id(); r < kWarp; r += warps) {
      const char* const row = from + (first_row + r) * p.mask.query;
      u32 mine = 0;
#pragma unroll 8
      for (int w = 0; w < kWarp; ++w) {
        const int key = (first_word + w) * 32 + lane;
        const bool seen = first_row + r < to.rows && key < p.seqlen_kv && row[key * p.mask.key] != 0;
        const u32 word = __ballot_sync(kAllLanes, seen);
        mine = w == lane ? word : mine;
      }
      words[lane][r] = mine;
    }
    __syncthreads();
    u32* const out = to.data + plane * to.plane();
    for (int w = warp_id(); w < kWarp; w += warps) {
      const u32 word = words[w][lane];
      const int keys = p.seqlen_kv - (first_word + w) * 32;  // that exist; only these and rows that exist count
      const u32 most = keys >= 32 ? ~0U : keys > 0 ? (1U << keys) - 1 : 0;
      const bool exists = first_row + lane < to.rows;
      if (exists && keys > 0) out[i64{first_word + w} * to.rows + first_row + lane] = word;
      const bool any = __any_sync(kAllLanes, word != 0), all = __all_sync(kAllLanes, word == most || !exists);
      if (lane < 2 && (lane == 0 ? any : all)) atomicOr(&facts[lane], 1U << w);
    }
    __syncthreads();
    if (threadIdx.x < 2) {
      out[i64{to.rows} * to.count + 2 * (i64{span} * to.groups() + group) + threadIdx.x] = facts[threadIdx.x];
      facts[threadIdx.x] = 0;
    }
  }
}

}  // namespace fovea::cuda
