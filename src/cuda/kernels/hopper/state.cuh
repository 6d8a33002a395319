#pragma once

#include "cuda/kernels/hopper/walk.cuh"

// What producer and consumers share.
namespace fovea::cuda {

/// What the threads of a block share.
template <ForwardSm90Spec S>
struct State {
  Ring<S.q_stages> q;
  Ring<S.stages> k, v;
  Barrier known, late;              // the next tile of rows; when to look for the one after
  static constexpr int kWorks = 4;  // the next one is known before Q is given back, and that before out is written
  Work<S> work[kWorks];
  Step steps[S.mask ? S.stages : 1];   // of the tiles of K in the ring
  Ring<S.stages> words[S.warpgroups];  // of a mask

  /// Warps that read what is known of tiles as well: one for each warpgroup.
  static constexpr u32 kFetchers = fetches_words(S) ? S.warpgroups : 0;
  static constexpr int kHands = kFetchers == 0 ? 128 : 64;  // threads that have q, k and v copied
};

/// Where everything lies in shared memory.
template <ForwardSm90Spec S>
struct Layout {
  static constexpr int kK = tile_bytes(S.block_n, S.head_dim), kV = tile_bytes(S.block_n, S.head_dim_v);
  u32 base;
  FOVEA_DEVICE u32 q(int place) const { return base + place * q_tile_bytes(S); }
  FOVEA_DEVICE u32 k(int place) const { return q(S.q_stages) + place * kK; }
  FOVEA_DEVICE u32 v(int place) const { return k(S.stages) + place * kV; }
  FOVEA_DEVICE u32 words(int group, int place) const {
    return v(S.stages) + (group * S.stages + place) * words_bytes(S);
  }
};

}  // namespace fovea::cuda
