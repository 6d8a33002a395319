#pragma once

#include "cuda/kernels/hopper/scheduler.cuh"

// The tiles of keys that a tile of rows has to see, last ones first; where a mask hides some for all rows, the others.
namespace fovea::cuda {

/// A tile of keys, and what a mask leaves of it to each warpgroup: bit g, some of its entries; bit 8 + g, all of them.
struct Step {
  int tile;  // below 0: none is left
  u32 seen;
  static constexpr u32 kLast = 1U << 31;  // no other tile follows

  FOVEA_DEVICE TileState mask(int group) const {
    if ((seen >> group & 1) == 0) return TileState::kHidden;
    return (seen >> (8 + group) & 1) != 0 ? TileState::kFull : TileState::kPartial;
  }
};

template <ForwardSm90Spec S>
struct Walk {
  static constexpr int kAhead = 16;  // tiles that a warp looks at together, for two warpgroups
  static constexpr u32 kOne = (1U << kAhead) - 1;
  static_assert(!S.mask || S.warpgroups <= 2);

  const ForwardSm90Params& p;
  const Work<S>& work;
  int tile = work.tiles.end - 1;  // the next one, or the first one looked at
  u32 some = 0, all = 0;          // of tiles from there on, kAhead bits for each warpgroup
  bool looked = false;

  /// By all lanes of a warp where there is a mask.
  FOVEA_DEVICE Step next() {
    if constexpr (S.mask) {
      for (;;) {
        if (tile < work.tiles.begin) return {-1, 0};
        if (!looked) look();
        const u32 any = (some | some >> kAhead) & kOne;
        if (any != 0) {
          const int i = __ffs(static_cast<int>(any)) - 1;
          const u32 seen =
              some >> i & 1 | (some >> (kAhead + i) & 1) << 1 | (all >> i & 1) << 8 | (all >> (kAhead + i) & 1) << 9;
          some &= ~((2U << i) - 1 | ((2U << i) - 1) << kAhead);
          return {tile - i, seen};
        }
        tile -= kAhead, looked = false;
      }
    } else {
      return {tile >= work.tiles.begin ? tile-- : -1, 0};
    }
  }

  FOVEA_DEVICE void look() {
    const int lane = lane_id(), group = lane / kAhead, mine = tile - lane % kAhead;
    const TileState state = mask_tile<S.block_n>(p, work.sequence, {work.rows.first_head, work.rows.first_head + 1},
                                                 work.rows.queries(group * kGroupRows, (group + 1) * kGroupRows),
                                                 math::larger(mine, 0) * S.block_n);
    const bool there = mine >= work.tiles.begin && group < S.warpgroups;
    some = __ballot_sync(kAllLanes, there && state != TileState::kHidden);
    all = __ballot_sync(kAllLanes, there && state == TileState::kFull);
    looked = true;
  }
};

}  // namespace fovea::cuda
