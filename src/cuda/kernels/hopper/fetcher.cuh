#pragma once

#include "cuda/kernels/hopper/state.cuh"

// A warp that copies the bias and the mask's words of one warpgroup's tiles to shared memory, ahead of their use. Loads
// to registers would not help: ptxas issues them only after the wait for a product, however early they are written.
namespace fovea::cuda {

template <ForwardSm90Spec S>
struct Fetcher {
  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  const int group;  // the warpgroup
  u32 keys = 0;     // tiles of keys so far
  u32 fetched = 0;  // and of these, those that the warpgroup computes

  FOVEA_DEVICE void run() {
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      state.q_of(group).await_full(n);
      const Work<S>& work = state.work[n % State<S>::kWorks];
      if (work.rows.left() <= 0) break;
      state.for_each_step(work, keys, [&](const Step& step) {
        if (!sight_of(work, group, step).hidden()) fetch(work, step.tile * S.block_n);
      });
      state.q_of(group).release(n);
    }
  }

  FOVEA_DEVICE void fetch(const Work<S>& work, int key) {
    auto& ring = state.entries[group];
    const int place = ring.place(fetched);
    if (!S.mask && !p.bias_by_engine) return;
    ring.await_empty(fetched);
    Barrier& full = ring.full[place];
    if constexpr (S.bias) {
      if (p.bias_by_engine && lane_id() == 0) {
        load_bias_panels<kGroupRows, S.block_n, S.bias_type>(
            at.bias(group, place), p, full, key,
            {work.rows.first + group * kGroupRows, work.rows.first_head, work.sequence.batch}, Keep::kAwhile);
      }
    }
    if constexpr (S.mask) fetch_words(work, at.words(group, place), key);
    full.arrive_behind_copies();
    ++fetched;
  }

  /// A lane copies the words of two rows.  Past the last row or key the last one is read.
  FOVEA_DEVICE void fetch_words(const Work<S>& work, u32 to, int key) const {
    constexpr int kGroups = mask_groups(S);
    const WordView& view = p.mask_words;
    const u32* const from = view.data + work.sequence.batch * view.batch;
#pragma unroll
    for (int r = lane_id(); r < kGroupRows; r += kWarp) {
      const int row = math::smaller(group * kGroupRows + r, work.rows.left() - 1);
      const int head = math::smaller(work.rows.head(row), work.rows.first_head + work.rows.group.heads - 1);
      const u32* const words = from + head * view.head + 4 * i64{work.rows.query(row)} * view.row;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int keys = math::smaller(key / 128 + g, view.count / 4 - 1);
        copy_four_words(to + (r * kGroups + g) * 16, words + 4 * i64{keys} * view.rows);
      }
    }
  }
};

}  // namespace fovea::cuda
