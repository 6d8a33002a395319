#pragma once

#include "cuda/spec.h"

// How a backward kernel cuts up its work and its shared memory.  Host and device compile this text.
namespace fovea::cuda {

/// Threads of the kernels around the main one.
inline constexpr int kSideThreads = 256;
inline constexpr int kSumRows = 16;     // of a block of `group_sums`
inline constexpr int kPartColumns = 8;  // rows of parts are whole multiples of
/// Of them on a multiprocessor at once, for they wait for memory.
inline constexpr int kSideBlocks = 4;

/// How the warps of a block share out a product: equal pieces in whole steps of 16, cut where the rows and columns to
/// be read are fewest.  Warps from `used` on have none.
struct WarpGrid {
  int rows = 0, columns = 0;  // of a warp's piece
  int across = 1, used = 0;

  FOVEA_FN static constexpr WarpGrid of(int m, int n, int warps) {
    WarpGrid best;
    for (int down = 1; down <= warps; ++down) {
      for (int across = 1; down * across <= warps; ++across) {
        if (m % (16 * down) != 0 || n % (16 * across) != 0) continue;
        const WarpGrid grid{m / down, n / across, across, down * across};
        const bool closer = grid.rows + grid.columns < best.rows + best.columns;
        if (grid.used > best.used || (grid.used == best.used && closer)) best = grid;
      }
    }
    return best;
  }
};

/// Whether a tile of rows or keys is swizzled: steps from where a warp's columns begin must not carry.
FOVEA_FN constexpr bool swizzles(const BackwardSpec& s, int dim) {
  return is_power_of_2(WarpGrid::of(s.block_n, dim, s.warps).across) &&
         is_power_of_2(WarpGrid::of(s.block_m, dim, s.warps).across);
}
FOVEA_FN constexpr int entry_bytes(const BackwardSpec& s) {  // P, dS; of these a warp's columns are side by side
  return tile_bytes(s.type, s.block_m, s.block_n, is_power_of_2(s.block_n));
}

inline constexpr int kWalkBytes = 384;  // of cuda::Walk

/// Where things lie in the main kernel's shared memory, in bytes.
struct BackwardShared {
  int k, v;              // the block's keys
  int ring, stage;       // tiles of rows in flight: q, then
  int dout, statistics;  // dout; log2_lse and delta
  int weights, ds;       // P and dS of a tile
  int entries;           // from one tile's to the next's
  int walk;              // cuda::Walk
  int total;

  FOVEA_FN static constexpr BackwardShared of(const BackwardSpec& s) {
    BackwardShared at{};
    const auto operand = [&](int rows, int dim) {
      return s.in_place ? 0 : tile_bytes(s.type, rows, dim, swizzles(s, dim));
    };
    at.k = 0;
    at.v = at.k + operand(s.block_n, s.head_dim);
    at.ring = at.v + operand(s.block_n, s.head_dim_v);
    at.dout = operand(s.block_m, s.head_dim);
    at.statistics = at.dout + operand(s.block_m, s.head_dim_v);
    at.stage = (at.statistics + 8 * s.block_m + 127) / 128 * 128;
    at.weights = at.ring + s.stages * at.stage;
    at.ds = at.weights + entry_bytes(s);
    at.entries = 2 * entry_bytes(s);
    at.walk = at.weights + (s.stages == 3 ? 2 : 1) * at.entries;
    at.total = at.walk + kWalkBytes;
    return at;
  }
};

FOVEA_FN constexpr int shared_bytes(const BackwardSpec& s) { return BackwardShared::of(s).total; }
/// What the portable bias gradient takes from a main kernel.
FOVEA_FN constexpr BackwardSpec bias_gradient_spec(BackwardSpec s) {
  s.block_n = math::smaller(s.block_n, 64), s.stages = 1;
  s.deterministic = s.holds_dq = s.ends_dq = s.goes_on = s.split_gqa = false;
  return s;
}
/// Of that, which keeps P and dS in registers, and whose sums take the place of all else in the end.
FOVEA_FN constexpr int bias_gradient_shared_bytes(const BackwardSpec& s) {
  return math::larger(BackwardShared::of(s).weights, s.block_m * pitch_of(Type::kFloat32, s.block_n));
}

/// Entries of a part of a tile of the bias gradient, and blocks of `bias_sums` that share them out.
FOVEA_FN constexpr int bias_entries(const BackwardSpec& s, bool own_rows, bool own_keys) {
  return (own_rows ? s.block_m : 1) * (own_keys ? s.block_n : 1);
}
FOVEA_FN constexpr int bias_pieces(const BackwardSpec& s, bool own_rows, bool own_keys) {
  return math::larger(bias_entries(s, own_rows, own_keys) / kSideThreads, 1);
}
inline constexpr int kBiasLanes = 8;  // of a block of `bias_sums` that read neighbours, at least

}  // namespace fovea::cuda
