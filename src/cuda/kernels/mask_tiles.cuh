#pragma once

#include "cuda/kernels/sequence.cuh"

// Tiles that a boolean mask hides or leaves alone, told from what `mask_words` has found out for each 32 × 32 entries.
namespace fovea::cuda {

/// What a tile's entries have to be asked for: the band, the mask, or nothing.
struct Sight {
  TileState band = TileState::kFull, mask = TileState::kFull;
  FOVEA_DEVICE bool hidden() const { return band == TileState::kHidden || mask == TileState::kHidden; }
  FOVEA_DEVICE bool full() const { return band == TileState::kFull && mask == TileState::kFull; }
};

/// What the mask makes of kKeys keys and some rows of some heads.  Where these begin or end within 32 rows or keys, all
/// of the 32 are judged.
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
