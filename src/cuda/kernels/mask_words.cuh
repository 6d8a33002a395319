#pragma once

#include "cuda/kernels/device.cuh"

// A boolean mask, read once: 32 keys become a bit each of a word, an eighth of the bytes for the kernels that ask for
// them once a head.  Words of the same keys lie row by row, so that the eight rows of a warp are neighbours.
namespace fovea::cuda {

/// Blocks: x: 32 words of 32 rows; y: sequences × heads that have a mask of their own, some of them at once.
template <ForwardSpec S>
__device__ void mask_words(const CallParams& p) {
  static_assert(kMaskTile == kWarp);  // a lane for each word, then for each row
  __shared__ u32 words[kWarp][kWarp + 1];
  const WordView& to = p.mask_words;
  const int across = (to.count + kWarp - 1) / kWarp, x = static_cast<int>(blockIdx.x);
  const int first_word = x % across * kWarp, first_row = x / across * kWarp;
  const int lane = lane_id(), warps = static_cast<int>(blockDim.x) / kWarp;
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
    for (int w = warp_id(); w < kWarp; w += warps) {
      if (first_word + w < to.count && first_row + lane < to.rows) {
        to.data[(i64{plane} * to.count + first_word + w) * to.rows + first_row + lane] = words[w][lane];
      }
    }
    __syncthreads();
  }
}

}  // namespace fovea::cuda
