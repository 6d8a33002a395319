#pragma once

#include "cuda/spec.h"

// What a kernel of the Hopper family is specialised for, and what lies in shared memory.  Both sides compile this.
namespace fovea::cuda {

struct ForwardSm90Spec {
  Type type = Type::kBFloat16;
  int head_dim = 128;    // of q and k, a multiple of 8
  int head_dim_v = 128;  // likewise
  int warpgroups = 2;    // that compute, each with 64 rows
  int block_n = 128;     // keys
  int stages = 2;        // tiles of K, and of V, in flight
  int q_stages = 2;      // tiles of rows in flight
  int blocks = 1;        // on a multiprocessor at once
  bool hold = true;      // weights wait in registers of their own until P V of the tile before is done
  bool turns = false;    // warpgroups take turns at the softmax
  bool mask = false;
  bool bias = false;
  Type bias_type = Type::kFloat32;
  bool alibi = false;
  bool softcap = false;
  bool dropout = false;
  bool split = false;     // blocks share out the keys of a tile of rows, and leave parts that are combined
  bool pack_gqa = false;  // a row is a query and one of up to 16 heads that share keys

  FOVEA_FN friend constexpr bool operator==(const ForwardSm90Spec&, const ForwardSm90Spec&) = default;
};

/// Calls f(name, value) for every field.
template <class F>
FOVEA_FN constexpr void each_field(const ForwardSm90Spec& s, F&& f) {
  f("type", s.type), f("head_dim", s.head_dim), f("head_dim_v", s.head_dim_v);
  f("warpgroups", s.warpgroups), f("block_n", s.block_n), f("stages", s.stages), f("q_stages", s.q_stages);
  f("blocks", s.blocks);
  f("hold", s.hold), f("turns", s.turns);
  f("mask", s.mask), f("bias", s.bias), f("bias_type", s.bias_type);
  f("alibi", s.alibi), f("softcap", s.softcap), f("dropout", s.dropout), f("split", s.split);
  f("pack_gqa", s.pack_gqa);
}

// A tile lies in panels of 64 columns: rows of 128 bytes, swizzled, a panel after the other.
inline constexpr int kPanelColumns = 64, kPanelRowBytes = 128, kGroupRows = 64;  // kGroupRows: of a warpgroup
inline constexpr int kWarpRows = kGroupRows / 4;
FOVEA_FN constexpr int panels_of(int dim) { return (dim + kPanelColumns - 1) / kPanelColumns; }
FOVEA_FN constexpr int tile_bytes(int rows, int dim) { return panels_of(dim) * rows * kPanelRowBytes; }

/// Of a first tile of keys of which a warpgroup sees no more than these, the rest is left out.  With two places for Q
/// the text that it takes costs more than it saves; with options, and with two head dims, there are no registers.
FOVEA_FN constexpr int short_n(const ForwardSm90Spec& s) {
  const bool bare = !s.mask && !s.bias && !s.alibi && !s.softcap && !s.dropout;
  return s.q_stages == 1 && bare && s.head_dim == s.head_dim_v ? (s.block_n / 2 + 15) / 16 * 16 : s.block_n;
}

FOVEA_FN constexpr int block_m(const ForwardSm90Spec& s) { return s.warpgroups * kGroupRows; }
/// Products are added to what slopes make of scores.  With a mask a tile is known only when its product is asked for.
FOVEA_FN constexpr bool begins_with_slopes(const ForwardSm90Spec& s) { return s.alibi && !s.softcap && !s.mask; }
FOVEA_FN constexpr int threads_of(const ForwardSm90Spec& s) { return (s.warpgroups + 1) * 128; }

/// Where there is one place for Q, that is given back as soon as all scores are made, and O leaves registers otherwise;
/// so do parts, in fp32.
FOVEA_FN constexpr bool leaves_through_q(const ForwardSm90Spec& s) { return s.q_stages > 1 && !s.split; }

/// Where there is one place for Q, a warpgroup gives its rows back alone.
FOVEA_FN constexpr int q_parts(const ForwardSm90Spec& s) { return s.q_stages == 1 ? s.warpgroups : 1; }
FOVEA_FN constexpr int q_rows(const ForwardSm90Spec& s) { return block_m(s) / q_parts(s); }

/// Shared memory of a block: `q_stages` times Q, in whose place O leaves; then `stages` times K, then V; then, ahead
/// for each warpgroup, bias and words of a mask; then barriers and what is known of the tiles of rows in flight.
FOVEA_FN constexpr int q_tile_bytes(const ForwardSm90Spec& s) {
  return q_parts(s) * tile_bytes(q_rows(s), math::larger(s.head_dim, s.head_dim_v));
}
inline constexpr int kStateBytes = 1024;
/// Tiles of a warpgroup whose entries' bias and mask have room.
FOVEA_FN constexpr int entry_places(const ForwardSm90Spec& s) { return s.bias && s.q_stages > 1 ? 1 : 2; }
FOVEA_FN constexpr int bias_panels(const ForwardSm90Spec& s) {
  return s.bias ? (s.block_n * bytes_of(s.bias_type) + kPanelRowBytes - 1) / kPanelRowBytes : 0;
}
FOVEA_FN constexpr int bias_bytes(const ForwardSm90Spec& s) { return bias_panels(s) * kGroupRows * kPanelRowBytes; }
/// Groups of 128 keys that a tile lies in.
FOVEA_FN constexpr int mask_groups(const ForwardSm90Spec& s) { return 128 % s.block_n == 0 ? 1 : 2; }
FOVEA_FN constexpr int words_bytes(const ForwardSm90Spec& s) { return s.mask ? kGroupRows * mask_groups(s) * 16 : 0; }
FOVEA_FN constexpr int shared_bytes(const ForwardSm90Spec& s) {
  return s.q_stages * q_tile_bytes(s) +
         s.stages * (tile_bytes(s.block_n, s.head_dim) + tile_bytes(s.block_n, s.head_dim_v)) +
         s.warpgroups * entry_places(s) * (bias_bytes(s) + words_bytes(s)) + kStateBytes;
}

/// Registers of a thread that loads and of one that computes: together what the launch gave, in eights.
FOVEA_FN constexpr int producer_registers(const ForwardSm90Spec& s) { return s.warpgroups > 2 ? 32 : s.mask ? 56 : 40; }
FOVEA_FN constexpr int consumer_registers(const ForwardSm90Spec& s) {
  return (65536 / s.blocks / threads_of(s) / 8 * 8 * (s.warpgroups + 1) - producer_registers(s)) / s.warpgroups / 8 * 8;
}

}  // namespace fovea::cuda
