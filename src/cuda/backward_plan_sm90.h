#pragma once

#include "cuda/backward_plan.h"
#include "cuda/spec_sm90.h"

// How the Hopper family's backward cuts up a block: 128 keys, 64 to each of two warpgroups, and a third that has rows
// copied.  It is specialised by the portable kernels' spec, of which `warps` are those that compute.  Host and device
// compile this text.
namespace fovea::cuda {

inline constexpr int kBackwardConsumers = 2;  // warpgroups
inline constexpr int kBackwardThreads = (kBackwardConsumers + 1) * 128;

/// Of a thread; together what the launch gave, three times 168.
FOVEA_FN constexpr int producer_registers(const BackwardSpec& s) { return !s.mask ? 40 : s.deterministic ? 72 : 56; }
FOVEA_FN constexpr int consumer_registers(const BackwardSpec& s) { return (3 * 168 - producer_registers(s)) / 2; }

/// Where rows of a tile are enough for both warpgroups, each makes dq of 64 rows; else of half of the columns.
FOVEA_FN constexpr bool shares_rows(const BackwardSpec& s) { return s.block_m == kBackwardConsumers * kGroupRows; }
/// Columns of dq that a warpgroup makes.
FOVEA_FN constexpr int dq_columns(const BackwardSpec& s) { return shares_rows(s) ? s.head_dim : kPanelColumns; }

/// Where things lie in its shared memory, in bytes.
struct BackwardSm90Shared {
  int k, v;                // the block's keys
  int q, q_stage;          // rings of rows
  int dout, dout_stage;    // likewise
  int ds, ds_stage;        // two tiles, [row][key]: one is written while the other is read
  int statistics;          // log2_lse and delta of each stage
  int statistics_of_tile;  // bytes of one of them
  int state;               // cuda::BackwardState
  int total;

  static constexpr int kStateBytes = 1024;

  FOVEA_FN static constexpr BackwardSm90Shared of(const BackwardSpec& s) {
    BackwardSm90Shared at{};
    at.v = at.k + tile_bytes(s.block_n, s.head_dim);
    at.q = at.v + tile_bytes(s.block_n, s.head_dim_v);
    at.q_stage = tile_bytes(s.block_m, s.head_dim);
    at.dout = at.q + s.stages * at.q_stage;
    at.dout_stage = tile_bytes(s.block_m, s.head_dim_v);
    at.ds = at.dout + s.stages * at.dout_stage;
    at.ds_stage = tile_bytes(s.block_m, s.block_n);
    at.statistics = at.ds + 2 * at.ds_stage;
    at.statistics_of_tile = 4 * s.block_m;
    at.state = at.statistics + 2 * s.stages * at.statistics_of_tile;
    at.total = at.state + kStateBytes;
    return at;
  }
};

}  // namespace fovea::cuda
