#pragma once

#include "cuda/backward_plan_sm90.h"
#include "cuda/kernels/backward_walk.cuh"
#include "cuda/kernels/hopper/tensor_copy.cuh"

// The shared memory of a block of the backward: what its warpgroups tell each other, and where tiles are.
namespace fovea::cuda {

/// With 8 steps, because the warpgroup of dq may still read a step when the fourth one after it is written.
template <BackwardSpec S>
using HopperWalk = Walk<S, 8, false>;

template <BackwardSpec S>
struct BackwardState {
  Barrier k, v;
  Ring<S.stages> q;           // log2_lse comes with it, and the words of a mask
  Ring<dout_stages(S)> dout;  // and delta with this
  Ring<2> ds;                 // of all who make it, in a pair both blocks'; who makes dq gives it back, in both
  bool spoiled[2];            // of each: where something hidden was not finite
  // Where keys are shared:
  Ring<2> weights;     // P in the place of dS, for who makes that; given back with it
  Ring<2> looked;      // at dP, by who makes it; what the other one awaits gives dout back for both
  u32 strange[2][2];   // of S and dP: n + 1 where something hidden was not finite in tile n
  HopperWalk<S> walk;  // a step is written before its q is announced
  Barrier other_k;     // of a pair
  int number;          // likewise
  Ring<BackwardSm90Shared::of(S).bias_places> bias;
  Barrier keys_read;  // by all, where a block has one tile of keys after the other
  BlockTask task;
  bool has_keys;  // the block owns keys of the task's sequence
  Ring<1> turns;  // of steps whose dq has been added

  FOVEA_DEVICE const Step& step(u32 n) const { return walk.steps[n % 8]; }
  FOVEA_DEVICE void begin(const BackwardParams& p, int block) {
    task = BlockTask::of<S>(p, block);
    has_keys = task.part < 0 && task.exists(p);
    if (has_keys) walk.take(p, task);
    has_keys = S.holds_dq || (has_keys && walk.key_block * S.block_n < walk.sequence.kv_rows);
  }
  /// The tile of dq_sum that step n adds to.
  FOVEA_DEVICE i64 dq_tile(u32 n) const { return S.ends_dq ? walk.dq_tiles[n % 8] : step(n).slot; }
  /// The block of keys of step n.
  FOVEA_DEVICE int key_block(u32 n) const { return S.holds_dq ? step(n).turn : walk.key_block; }
  FOVEA_DEVICE bool last_keys(int key_block) const { return (key_block + 1) * S.block_n >= walk.sequence.kv_rows; }
  /// By each warp, when it has read the last of these keys.
  FOVEA_DEVICE void leave_keys() {
    __syncwarp();
    if (static_cast<u32>(lane_id()) < kArrivals) keys_read.arrive();
  }
};

template <BackwardSpec S>
FOVEA_DEVICE int rank_of_block() {
  return shares_keys(S) ? rank_in_pair() : 0;
}
/// Of a block of the cluster.
template <BackwardSpec S>
FOVEA_DEVICE int first_key_of_block(int key_block, int rank) {
  return key_block * S.block_n + rank * keys_of_block(S);
}

/// Where everything lies in shared memory.
template <BackwardSpec S>
struct BackwardLayout {
  static constexpr BackwardSm90Shared kShared = BackwardSm90Shared::of(S);
  static constexpr u32 kDqStages = math::larger(kShared.dq_stages, 1);
  u32 base;
  FOVEA_DEVICE u32 k() const { return base + kShared.k; }
  FOVEA_DEVICE u32 v() const { return base + kShared.v; }
  FOVEA_DEVICE u32 q(int place) const { return base + kShared.q + place * kShared.q_stage; }
  FOVEA_DEVICE u32 dout(int place) const { return base + kShared.dout + place * kShared.dout_stage; }
  FOVEA_DEVICE u32 bias(int place) const { return base + kShared.bias + place * kShared.bias_stage; }
  FOVEA_DEVICE u32 ds(u32 n) const { return base + kShared.ds + (n & 1) * kShared.ds_stage; }
  FOVEA_DEVICE u32 other_k() const { return base + kShared.other_k; }
  FOVEA_DEVICE u32 other_ds(u32 n) const { return base + kShared.other_ds + (n & 1) * kShared.ds_stage; }
  FOVEA_DEVICE u32 dropped(u32 n) const {
    return base + kShared.dropped + (n & 1) * kDroppedBytes + threadIdx.x % 128 * 4;
  }
  FOVEA_DEVICE u32 held(int tile) const { return base + kShared.held + tile * held_bytes(S); }
  FOVEA_DEVICE u32 dq(int warp, u32 n) const {
    return base + kShared.dq + (warp * kDqStages + n % kDqStages) * dq_piece_bytes(S);
  }
  FOVEA_DEVICE u32 log2_lse(int place) const {
    return base + kShared.statistics + 2 * place * kShared.statistics_of_tile;
  }
  FOVEA_DEVICE u32 delta(int place) const { return log2_lse(place) + kShared.statistics_of_tile; }
  FOVEA_DEVICE u32 words(int place) const { return base + kShared.words + place * kShared.words_stage; }
};

/// An element of a tile of kRows rows in panels.
template <int kRows>
FOVEA_DEVICE u32 element(u32 tile, u32 row, u32 column) {
  return tile + column / kPanelColumns * (kRows * kPanelRowBytes) + row * kPanelRowBytes +
         ((column % kPanelColumns / 8 ^ row & 7) << 4) + column % 8 * 2;
}

}  // namespace fovea::cuda
