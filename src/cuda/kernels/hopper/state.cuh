#pragma once

#include "cuda/kernels/hopper/walk.cuh"

// The shared memory of a block of the forward: what producers and consumers tell each other, and where tiles are.
namespace fovea::cuda {

/// What producers and consumers tell each other.
template <ForwardSm90Spec S>
struct State {
  Ring<S.q_stages> q[q_parts(S)];
  Ring<S.stages> k, v;
  Barrier known, late;              // the next tile of rows is known; it is time to claim the one after
  static constexpr int kWorks = 4;  // a next one is known before Q is released, and Q is before out is written
  Work<S> work[kWorks];
  PackedTiles packed;                           // of the thread that claims tiles
  Step steps[S.mask ? S.stages : 1];            // of the tiles of K in the ring
  Ring<entry_places(S)> entries[S.warpgroups];  // tiles of a bias and a mask

  FOVEA_DEVICE Ring<S.q_stages>& q_of(int group) { return q[q_parts(S) == 1 ? 0 : group]; }

  /// Fetcher warps, one for each warpgroup, which also read `work` and `steps`.
  static constexpr u32 kFetchers = S.mask || S.bias ? S.warpgroups : 0;
  static constexpr int kHands = kFetchers == 0 ? 128 : 64;  // threads that copy q, k and v

  /// Calls f(step) for each tile of keys in the order of the walk; `keys` counts the tiles of the whole launch.
  template <class F>
  FOVEA_DEVICE void for_each_step(const Work<S>& of, u32& keys, const F& f) {
    if constexpr (S.mask) {
      bool more = !of.tiles.empty();
#pragma unroll 1
      for (; more; ++keys) {
        k.await_full(keys);
        const Step step = steps[k.place(keys)];
        k.release(keys);
        more = (step.seen & Step::kLast) == 0;
        f(step);
      }
    } else {
#pragma unroll 1
      for (int tile = of.tiles.end - 1; tile >= of.tiles.begin; --tile) f(Step{tile, 0});
    }
  }
};

/// Where everything lies in shared memory.
template <ForwardSm90Spec S>
struct Layout {
  static constexpr int kK = tile_bytes(S.block_n, S.head_dim), kV = tile_bytes(S.block_n, S.head_dim_v);
  u32 base;
  FOVEA_DEVICE u32 q(int place, int part = 0) const {
    return base + (place * q_parts(S) + part) * (q_tile_bytes(S) / q_parts(S));
  }
  FOVEA_DEVICE u32 k(int place) const { return q(S.q_stages) + place * kK; }
  FOVEA_DEVICE u32 v(int place) const { return k(S.stages) + place * kV; }
  FOVEA_DEVICE u32 bias(int group, int place) const {
    return v(S.stages) + (group * entry_places(S) + place) * bias_bytes(S);
  }
  FOVEA_DEVICE u32 words(int group, int place) const {
    return bias(S.warpgroups, 0) + (group * entry_places(S) + place) * words_bytes(S);
  }
};

}  // namespace fovea::cuda
