#pragma once

#include "cuda/kernels/hopper/scheduler.cuh"

// The walk of a tile of rows over its tiles of keys, last ones first, without those that a mask hides from all rows.
namespace fovea::cuda {

/// A tile of keys, and what a mask keeps of it for warpgroup g: bit g, some of its entries; bit 8 + g, all of them.
struct Step {
  int tile;
  u32 seen;
  static constexpr u32 kLast = 1U << 31;  // no other tile follows

  FOVEA_DEVICE bool last() const { return (seen & kLast) != 0; }
  FOVEA_DEVICE TileState mask(int group) const {
    if ((seen >> group & 1) == 0) return TileState::kHidden;
    return (seen >> (8 + group) & 1) != 0 ? TileState::kFull : TileState::kPartial;
  }
};

/// What the 64 rows of a warpgroup see of a tile.
template <ForwardSm90Spec S>
FOVEA_DEVICE Sight sight_of(const Work<S>& work, int group, const Step& step) {
  return {work.band_of(group, step.tile), S.mask ? step.mask(group) : TileState::kFull};
}

template <ForwardSm90Spec S, bool kMask = S.mask>
struct Walk {
  const Work<S>& work;
  int tile = work.tiles.end - 1;

  FOVEA_DEVICE Walk(const ForwardSm90Params&, const Work<S>& of) : work(of) {}
  FOVEA_DEVICE bool there() const { return tile >= work.tiles.begin; }
  FOVEA_DEVICE Step now() const { return {tile, 0}; }
  FOVEA_DEVICE bool any_before() const { return tile + 1 < work.tiles.end; }
  FOVEA_DEVICE int before() const { return tile + 1; }
  FOVEA_DEVICE void advance() { --tile; }
};

/// With a mask, by all lanes of a warp, which look up many tiles at once.  Where all is hidden, it walks one.
template <ForwardSm90Spec S>
struct Walk<S, true> {
  static constexpr int kAhead = 16;  // tiles, for two warpgroups
  static constexpr u32 kOne = (1U << kAhead) - 1;
  static_assert(S.warpgroups <= 2);

  const ForwardSm90Params& p;
  const Work<S>& work;
  int looked = work.tiles.end;  // this tile and later ones have been looked up
  u32 some = 0, all = 0;        // of the last kAhead of these, without walked ones, kAhead bits for each warpgroup
  Step step{-1, 0}, next{-1, 0};
  int last = -1;

  FOVEA_DEVICE Walk(const ForwardSm90Params& params, const Work<S>& of) : p(params), work(of) {
    if (work.tiles.empty()) return;
    next = find();
    if (next.tile < 0) next = {work.tiles.begin, 0};
    advance();
    last = -1;
  }
  FOVEA_DEVICE bool there() const { return step.tile >= 0; }
  FOVEA_DEVICE Step now() const { return {step.tile, step.seen | (next.tile < 0 ? Step::kLast : 0U)}; }
  FOVEA_DEVICE bool any_before() const { return last >= 0; }
  FOVEA_DEVICE int before() const { return last; }
  FOVEA_DEVICE void advance() {
    last = step.tile;
    step = next;
    if (next.tile >= 0) next = find();
  }

  FOVEA_DEVICE Step find() {
    for (;;) {
      const u32 any = (some | some >> kAhead) & kOne;
      if (any != 0) {
        const int i = __ffs(static_cast<int>(any)) - 1;
        const u32 bit = 1U << i | 1U << (kAhead + i), seen = some & bit, whole = all & bit;
        some &= ~bit;
        return {looked + kAhead - 1 - i, (seen >> i & 1) | (seen >> (kAhead + i) & 1) << 1 | (whole >> i & 1) << 8 |
                                             (whole >> (kAhead + i) & 1) << 9};
      }
      if (looked <= work.tiles.begin) return {-1, 0};
      look();
    }
  }

  FOVEA_DEVICE void look() {
    const int lane = lane_id(), group = lane / kAhead, mine = looked - 1 - lane % kAhead;
    const TileState state = mask_tile<S.block_n>(
        p, work.sequence, {work.rows.first_head, work.rows.first_head + work.rows.group.heads},
        work.rows.queries(group * kGroupRows, (group + 1) * kGroupRows), math::larger(mine, 0) * S.block_n);
    const bool there = mine >= work.tiles.begin && group < S.warpgroups;
    some = __ballot_sync(kAllLanes, there && state != TileState::kHidden);
    all = __ballot_sync(kAllLanes, there && state == TileState::kFull);
    looked -= kAhead;
  }
};

}  // namespace fovea::cuda
