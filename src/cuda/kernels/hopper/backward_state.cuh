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
  static constexpr BackwardSm90Shared kShared = BackwardSm90Shared::of(S);
  Ring<kShared.k_places> k;  // of the block's tasks, or of its tiles of keys one after the other
  Ring<kShared.v_places> v;
  Ring<S.stages> q;           // log2_lse comes with it, and the words of a mask
  Ring<dout_stages(S)> dout;  // and delta with this
  Ring<2> ds;                 // of all who make it, in a pair both blocks'; who makes dq gives it back, in both
  bool spoiled[2];            // of each: where something hidden was not finite
  // Where keys are shared:
  Ring<shares_keys(S) ? 2 : 1> weights;  // P in the place of dS, for who makes that; given back with it
  Ring<shares_keys(S) ? 2 : 1> looked;   // at dP, by who makes it; what the other one awaits gives dout back for both
  u32 strange[2][2];                     // of S and dP: n + 1 where something hidden was not finite in tile n
  HopperWalk<S> walk;                    // a step is written before its q is announced
  Barrier other_k;                       // of a pair
  int number;                            // likewise
  Ring<kShared.bias_places> bias;
  static constexpr int kTasks = S.goes_on ? 4 : 1;
  BlockTask tasks[kTasks];  // who makes dq may be at one when the third one after it is written
  bool has_keys;            // the block owns keys of the task's sequence
  Ring<1> turns;            // of steps whose dq has been added

  FOVEA_DEVICE const Step& step(u32 n) const { return walk.steps[n % 8]; }
  FOVEA_DEVICE const BlockTask& task(int i = 0) const { return tasks[i % kTasks]; }
  /// Whether a block that goes on has an i-th task.
  FOVEA_DEVICE bool has_task(int i) const { return uniform(task(i).turn >= 0); }
  FOVEA_DEVICE bool ends_dq(int i) const { return uniform(task(i).has_part()); }
  /// Asks for it, by one thread, which passes over numbers without a task; a turn of −1: there is none left.
  FOVEA_DEVICE void ask_for_task(const BackwardSm90Params& p, int i) {
    BlockTask next{-1, 0, 0, -1, -1};
    for (int number = atomicAdd(p.begun, 1); number < p.tasks; number = atomicAdd(p.begun, 1)) {
      next = BlockTask::of<S>(p, number);
      if (next.exists(p)) break;
      next.turn = -1;
    }
    tasks[i % kTasks] = next;
  }
  FOVEA_DEVICE void begin(const BackwardParams& p, int block) {
    const BlockTask mine = BlockTask::of<S>(p, block);
    tasks[0] = mine;
    has_keys = !mine.has_part() && mine.exists(p);
    if (has_keys) walk.take(p, mine);
    has_keys = S.holds_dq || (has_keys && walk.key_block * S.block_n < walk.sequence.kv_rows);
  }
  /// The tile of dq_sum that step n adds to.
  FOVEA_DEVICE i64 dq_tile(u32 n) const { return S.ends_dq ? walk.dq_tiles[n % 8] : step(n).slot; }
  /// The block of keys of step n.
  FOVEA_DEVICE int key_block(u32 n) const { return S.holds_dq || S.goes_on ? step(n).stage : walk.key_block; }
  FOVEA_DEVICE bool last_keys(int key_block) const { return (key_block + 1) * S.block_n >= walk.sequence.kv_rows; }
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
  /// Of a task, or of a tile of keys.
  FOVEA_DEVICE u32 k(int of = 0) const {
    return base + kShared.k + of % kShared.k_places * tile_bytes(keys_of_block(S), S.head_dim);
  }
  FOVEA_DEVICE u32 v(int of = 0) const {
    return base + kShared.v + of % kShared.v_places * tile_bytes(keys_of_block(S), S.head_dim_v);
  }
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
