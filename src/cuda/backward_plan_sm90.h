#pragma once

#include "cuda/backward_plan.h"
#include "cuda/spec_sm90.h"

// How the Hopper family's backward divides a block's work: 128 keys, 64 for each of two warpgroups, or, where head dims
// are wide, 64 keys of which one warpgroup makes dv and the other dk; a third warpgroup makes dq from their dS in
// shared memory, and a fourth one copies rows.  Blocks of 64 keys are pairs, a cluster whose blocks send each other dS:
// each makes half of the columns of dq for the 128 keys of both, so that half as much is added up.  Specialised by the
// portable kernels' spec, of which `block_n` are the keys of a pair, and `warps` those of the first two.  Host and
// device compile this text.
namespace fovea::cuda {

inline constexpr int kBackwardConsumers = 2;  // warpgroups that have keys
inline constexpr int kBackwardThreads = (kBackwardConsumers + 2) * 128;
inline constexpr int kMostShared = 227 * 1024;  // bytes of a block

/// Both warpgroups have the block's keys: one makes P and dv, the other dS and dk; and blocks are in pairs.
FOVEA_FN constexpr bool shares_keys(const BackwardSpec& s) { return math::larger(s.head_dim, s.head_dim_v) > 128; }
FOVEA_FN constexpr int blocks_of_cluster(const BackwardSpec& s) { return shares_keys(s) ? 2 : 1; }
FOVEA_FN constexpr int keys_of_block(const BackwardSpec& s) { return s.block_n / blocks_of_cluster(s); }
/// Without options, a bias apart.
FOVEA_FN constexpr bool is_bare(const BackwardSpec& s) { return !s.mask && !s.dropout && !s.alibi && !s.softcap; }
/// Tiles of dout in flight.
FOVEA_FN constexpr int dout_stages(const BackwardSpec& s) { return shares_keys(s) ? 1 : s.stages; }

/// Registers of a thread by role; the roles together have the launch's four times 128.  Wide sums need most of them.
FOVEA_FN constexpr bool is_wide(const BackwardSpec& s) {
  return s.block_m > kGroupRows || math::larger(s.head_dim, s.head_dim_v) > 96;
}
/// Columns of dq that are made at once: all, where there is room, else a panel: no product begins within one.
FOVEA_FN constexpr int dq_columns(const BackwardSpec& s) {
  const int most = is_wide(s) || s.bias ? kPanelColumns : s.mask ? 80 : 96;
  return s.head_dim <= most ? s.head_dim : math::smaller(s.head_dim, kPanelColumns);
}
/// Of the warpgroup of dq.
FOVEA_FN constexpr int dq_registers(const BackwardSpec& s) { return is_wide(s) ? 64 : dq_columns(s) > 80 ? 80 : 72; }
/// A mask's walk needs 56; with fewer it spills, but only once a tile and beside the products.
FOVEA_FN constexpr int producer_registers(const BackwardSpec& s) {
  return is_wide(s) || dq_registers(s) > 72 ? 32 : !s.mask ? 40 : s.deterministic ? 72 : 56;
}
FOVEA_FN constexpr int consumer_registers(const BackwardSpec& s) {
  return (4 * 128 - producer_registers(s) - dq_registers(s)) / 16 * 8;
}

/// Bytes of 16 rows of those columns.
FOVEA_FN constexpr int dq_piece_bytes(const BackwardSpec& s) { return 16 * dq_columns(s) * 4; }
/// The most panels of dq of a tile that a block of a pair makes; of an odd number, both take the middle one in turns.
FOVEA_FN constexpr int dq_panels(const BackwardSpec& s) { return (panels_of(s.head_dim) + 1) / 2; }

/// Bytes of dq of a tile of rows, as accumulators lie in warps, where it is held.
FOVEA_FN constexpr int held_bytes(const BackwardSpec& s) { return s.block_m * dq_columns(s) * 4; }
inline constexpr int kMostHeld = 32;  // tiles of rows

inline constexpr int kDroppedBytes = 128 * 4;  // of what dropout drops of a tile

/// Where things lie in its shared memory, in bytes.
struct BackwardSm90Shared {
  int k, v;  // the block's keys, of two tasks where there is room
  int k_places, v_places;
  int other_k;             // in a pair, the panels of the other's that dq is made of
  int q, q_stage;          // rings of rows
  int dout, dout_stage;    // likewise
  int ds, ds_stage;        // two tiles, [row][key]: one is written while the other is read; first P, if keys are shared
  int other_ds;            // likewise the other block's of a pair
  int dropped;             // two tiles' of what dropout drops, a word each thread, if keys are shared
  int dq, dq_stages;       // what waits to be added by the copy engine, warp by warp: so many pieces each
  int statistics;          // log2_lse and delta of each stage
  int statistics_of_tile;  // bytes of one of them
  int words, words_stage;  // a mask's, of each stage, in `WordOrder::kColumns`
  int state;               // cuda::BackwardState
  int bias, bias_stage;    // tiles of a bias, [row][key] in panels, two where there is room
  int bias_places;
  int held, held_tiles;  // of rows whose dq is held: as many as there is room for
  int total;

  /// Pairs of blocks add dq from registers, in turns one of two panels by the engine, where there is room for it.
  FOVEA_FN static constexpr BackwardSm90Shared of(const BackwardSpec& s) {
    if (s.holds_dq) return with(s, 0);
    if (s.goes_on) return with(s, 2, 2, with(s, 2, 2, 2).total <= kMostShared ? 2 : 1);
    if (!shares_keys(s)) return with(s, 2);
    return with(s, s.deterministic && with(s, 1).total <= kMostShared ? 1 : 0);
  }
  FOVEA_FN static constexpr BackwardSm90Shared with(const BackwardSpec& s, int dq_stages, int k_places = 1,
                                                    int v_places = 1) {
    BackwardSm90Shared at{};
    const int keys = keys_of_block(s);
    at.k_places = k_places, at.v_places = v_places;
    at.v = at.k + k_places * tile_bytes(keys, s.head_dim);
    at.other_k = at.v + v_places * tile_bytes(keys, s.head_dim_v);
    at.q = at.other_k + (shares_keys(s) ? dq_panels(s) * keys * kPanelRowBytes : 0);
    at.q_stage = tile_bytes(s.block_m, s.head_dim);
    at.dout = at.q + s.stages * at.q_stage;
    at.dout_stage = tile_bytes(s.block_m, s.head_dim_v);
    at.ds = at.dout + dout_stages(s) * at.dout_stage;
    at.ds_stage = tile_bytes(s.block_m, keys);
    at.other_ds = at.ds + 2 * at.ds_stage;
    at.dropped = at.other_ds + (shares_keys(s) ? 2 * at.ds_stage : 0);
    at.dq = at.dropped + (shares_keys(s) && s.dropout ? 2 * kDroppedBytes : 0);
    at.dq_stages = dq_stages;
    at.statistics = at.dq + 4 * dq_stages * dq_piece_bytes(s);
    at.statistics_of_tile = 4 * s.block_m;
    at.words = at.statistics + 2 * s.stages * at.statistics_of_tile;
    at.words_stage = s.mask ? s.block_m * keys / 8 : 0;
    at.state = at.words + s.stages * at.words_stage;
    at.bias = at.state + kStateBytes;
    at.bias_stage = s.bias ? s.block_m * keys * bytes_of(s.bias_type) : 0;
    at.bias_places = at.bias + 2 * at.bias_stage <= kMostShared && !s.holds_dq ? 2 : 1;
    at.held = at.bias + at.bias_places * at.bias_stage;
    at.held_tiles = s.holds_dq ? math::smaller((kMostShared - at.held) / held_bytes(s), kMostHeld) : 0;
    at.total = at.held + at.held_tiles * held_bytes(s);
    return at;
  }
};

/// Threads that turn sums into dq.
FOVEA_FN constexpr int ending_threads(const BackwardSpec& s) {
  return s.goes_on ? kBackwardConsumers * 128 : kBackwardThreads;
}

/// Where a block ends dq, each warp has some runs of so many pieces of 16 × 8 sums under way.  They lie in front of the
/// state, behind the bytes of zeros that clear one, and the warps' barriers; and behind the next task's keys.
inline constexpr int kDqRun = 8, kDqRunBytes = kDqRun * 512, kDqRunsBegin = kDqRunBytes + 1024;
FOVEA_FN constexpr int ending_begin(const BackwardSpec& s) { return s.goes_on ? BackwardSm90Shared::of(s).q : 0; }
FOVEA_FN constexpr int dq_runs_at_once(const BackwardSpec& s) {
  const int room = BackwardSm90Shared::of(s).state - ending_begin(s) - kDqRunsBegin;
  return math::smaller(room / (ending_threads(s) / 32 * kDqRunBytes), 4);
}

/// Where things lie in the shared memory of the bias's gradient, of which a block has 128 × 128 entries: places of
/// their bias, then of their sum; a ring of panels, of K and as many rows of q, then of V and dout; a step's facts.
struct BiasGradientSm90Shared {
  int bias_places, bias_stage;
  int ring, places, place;
  int key_panels, panels;  // of a step: of K and q, and all
  int statistics, steps;   // log2_lse and delta of as many steps
  int words, words_stage;  // a mask's, of 64 rows, twice a step
  int state, total;

  /// As many places as there is room for, at best two of the bias and five panels.
  FOVEA_FN static constexpr BiasGradientSm90Shared of(const BackwardSpec& s) {
    BiasGradientSm90Shared at{};
    for (int bias_places = 2; bias_places > 0; --bias_places) {
      for (int places = 5; places > 3; --places) {
        at = with(s, bias_places, places);
        if (at.total <= kMostShared) return at;
      }
    }
    return at;
  }
  FOVEA_FN static constexpr BiasGradientSm90Shared with(const BackwardSpec& s, int bias_places, int places) {
    BiasGradientSm90Shared at{};
    at.bias_places = bias_places, at.places = places;
    at.bias_stage = s.block_m * s.block_n * bytes_of(s.bias_type);
    at.ring = bias_places * at.bias_stage;
    at.place = (s.block_m + s.block_n) * kPanelRowBytes;
    at.key_panels = panels_of(s.head_dim), at.panels = at.key_panels + panels_of(s.head_dim_v);
    at.statistics = at.ring + places * at.place;
    at.steps = 2;  // who has given back V of one has left it behind
    while (at.steps * at.panels < places + at.key_panels) at.steps *= 2;
    at.words = at.statistics + at.steps * 2 * 4 * s.block_m;
    at.words_stage = s.mask ? s.block_n * kGroupRows / 8 : 0;
    at.state = at.words + at.steps * 2 * at.words_stage;
    at.total = at.state + kStateBytes;
    return at;
  }
};

}  // namespace fovea::cuda
