#pragma once

#include "cuda/kernels/hopper/state.cuh"

// A warp that brings a mask's words to shared memory for one warpgroup, tiles ahead: ptxas starts a load to registers
// only behind the wait for a product, however early it is asked for.
namespace fovea::cuda {

/// What a mask leaves of a lane's entries of a tile.
template <ForwardSm90Spec S>
struct SeenEntries {
  static constexpr int kWords = S.block_n / 32;
  u32 seen[2];  // of a row: bit 2j + e

  template <class Order>
  FOVEA_DEVICE bool sees(int /*i*/, int j, int e) const {
    constexpr u32 kBit = 1;
    return (seen[e / 2] & kBit << (2 * j + e % 2)) != 0;
  }

  /// A lane has two bits of every eight of a word: a product brings them together.
  FOVEA_DEVICE void read(u32 words) {
    const int row = warp_id() % 4 * 16 + lane_id() / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      seen[h] = 0;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const u32 word = load_shared(words + ((row + 8 * h) * kWords + w) * 4) >> AsTheyAre::of_lane(lane_id() % 4);
        seen[h] |= ((word & 0x03030303U) * 0x01041040U) >> 24 << 8 * w;
      }
    }
  }
};

template <ForwardSm90Spec S>
struct Fetcher {
  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  const int group;  // of rows: the warpgroup's
  u32 keys = 0;     // tiles of K so far
  u32 fetched = 0;  // and of these, those whose words were fetched

  FOVEA_DEVICE void run() {
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      state.q.await_full(n);
      const Work<S>& work = state.work[n % State<S>::kWorks];
      if (work.rows.left() <= 0) break;
      bool more = !work.tiles.empty();
#pragma unroll 1
      for (; more; ++keys) {
        state.k.await_full(keys);
        const Step step = state.steps[state.k.place(keys)];
        state.k.release(keys);
        more = (step.seen & Step::kLast) == 0;
        if (!Sight{work.band_of(group, step.tile), step.mask(group)}.hidden()) fetch(work, step.tile * S.block_n);
      }
      state.q.release(n);
    }
  }

  /// Row by row.  Past the last row or key the last one is read: such entries are hidden anyway.
  FOVEA_DEVICE void fetch(const Work<S>& work, int key) {
    static_assert(S.block_n % 32 == 0);
    constexpr int kWords = S.block_n / 32;
    const WordView& view = p.mask_words;
    auto& ring = state.words[group];
    const u32 to = at.words(group, ring.place(fetched));
    const u32* const from = view.data + work.sequence.batch * view.batch + work.rows.first_head * view.head;
    ring.await_empty(fetched);
#pragma unroll
    for (int r = lane_id(); r < kGroupRows; r += kWarp) {
      const int row = work.rows.query(math::smaller(group * kGroupRows + r, work.rows.left() - 1));
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        copy_word(to + (r * kWords + w) * 4,
                  from + row * view.row + i64{math::smaller(key / 32 + w, view.count - 1)} * view.rows);
      }
    }
    ring.full[ring.place(fetched)].arrive_behind_copies();
    ++fetched;
  }
};

}  // namespace fovea::cuda
