#pragma once

#include "cuda/kernels/sequence.cuh"

// Which tiles a boolean mask hides or leaves whole, by the summary that `mask_words` made of each 32 × 32 entries.
namespace fovea::cuda {

/// Which rules a tile's entries have to be checked against one by one: the band, the mask, both or none.
struct Sight {
  TileState band = TileState::kFull, mask = TileState::kFull;
  FOVEA_DEVICE bool hidden() const { return band == TileState::kHidden || mask == TileState::kHidden; }
};

/// Whether the mask hides or keeps all of kKeys keys for some rows of some heads.  Judged by whole groups of 32 rows
/// and 32 keys, so that kPartial may be said of what is hidden or full.
template <int kKeys>
FOVEA_DEVICE TileState mask_tile(const CallParams& p, const Sequence& sequence, Interval heads, Interval rows,
                                 int key) {
  const WordView& view = p.mask_words;
  if (view.head == 0) heads = {0, 1};
  const int first = key / 32, last = math::smaller((key + kKeys - 1) / 32, view.count - 1), most = view.groups() - 1;
  u32 any = 0, all = ~0U;
#pragma unroll 1
  for (int h = heads.begin; h < heads.end; ++h) {
    const u32* const facts = view.data + sequence.batch * view.batch + h * view.head + i64{view.rows} * view.count;
#pragma unroll 2
    for (int g = math::smaller(rows.begin / 32, most); g <= math::smaller((rows.end - 1) / 32, most); ++g) {
      const u32* const low = facts + 2 * (i64{first / 32} * view.groups() + g);
      const u32* const high = 1024 % kKeys == 0 ? low : facts + 2 * (i64{last / 32} * view.groups() + g);
      any |= __funnelshift_r(low[0], high[0], first);
      all &= __funnelshift_r(low[1], high[1], first);
    }
  }
  const u32 keys = (2U << (last - first)) - 1;
  if ((any & keys) == 0) return TileState::kHidden;
  return (~all & keys) == 0 ? TileState::kFull : TileState::kPartial;
}

}  // namespace fovea::cuda
