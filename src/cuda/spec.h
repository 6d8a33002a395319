#pragma once

#include "math/fn.h"

// What a GPU kernel is specialised for, at run time, by compiling it: only what changes its inner loop, never sizes.
// Host and device compile this text.  Each spec lists its fields once, in `each_field`: rendering, hashing and printing
// all go by that list.
namespace fovea::cuda {

enum class Type : int { kFloat32, kFloat16, kBFloat16 };

FOVEA_FN constexpr int bytes_of(Type type) { return type == Type::kFloat32 ? 4 : 2; }

/// Bytes from row to row of a tile in shared memory: an odd number of 16-byte pieces, so that a column of pieces, read
/// down the rows, meets every bank.
FOVEA_FN constexpr int pitch_of(Type type, int dim) { return (dim * bytes_of(type) / 16 | 1) * 16; }
/// Or swizzled, which rows of whole 64 bytes may be, of 64 16-bit elements or more.
FOVEA_FN constexpr bool swizzled(Type type, int dim) { return type != Type::kFloat32 && dim >= 64 && dim % 32 == 0; }
FOVEA_FN constexpr bool is_power_of_2(int n) { return (n & (n - 1)) == 0; }
FOVEA_FN constexpr int tile_bytes(Type type, int rows, int dim, bool swizzles) {
  return rows * (swizzles && swizzled(type, dim) ? dim * bytes_of(type) : pitch_of(type, dim));
}

/// How a 16 × 8 piece of a product is made.
enum class Mma : int {
  kHalf16,    // m16n8k16 of fp16 or bf16 (sm_80)
  kHalf8,     // two m16n8k8 of fp16 (sm_75)
  kTf32x3,    // fp32 as three products of TF32 halves (sm_80)
  kTf32x6,    // as six of thirds, which leave nothing out, where so few are added up that it would show (sm_80)
  kShuffles,  // fp32 multiply-adds between lanes, for what a GPU has no unit for: bf16 and fp32 on sm_75
};

FOVEA_FN constexpr bool is_tf32(Mma mma) { return mma == Mma::kTf32x3 || mma == Mma::kTf32x6; }

struct ForwardSpec {
  Type type = Type::kBFloat16;
  Mma mma = Mma::kHalf16;
  bool async_copy = true;  // cp.async (sm_80)
  int head_dim = 64;       // of q and k, rounded up to whole products
  int head_dim_v = 64;     // columns of v that one block works on, likewise
  int block_m = 128;       // rows
  int block_n = 64;        // keys
  int warps = 4;
  int across = 1;              // warps that share rows, each with its part of a tile's keys and of v's columns
  int slices = 1;              // times `warps`, all with the same rows, each with tiles of keys of its own
  int stages = 2;              // tiles of keys in flight
  bool spread_copies = false;  // they leave between the steps of a product
  bool swizzled = false;       // tiles of keys are, where their rows may be
  bool in_place = false;       // Q stays where it lies, and is read there
  bool halved_q = false;       // Q lies as the halves of TF32, and need not be halved for each tile of keys
  bool pack_gqa = false;       // a row is a query and a head of the group, not a query of one head
  bool split = false;          // keys are shared out to several blocks, whose parts are combined
  bool band = false;           // causal or a window
  bool mask = false;
  bool bias = false;
  Type bias_type = Type::kFloat32;
  bool alibi = false;
  bool softcap = false;
  bool dropout = false;

  FOVEA_FN friend constexpr bool operator==(const ForwardSpec&, const ForwardSpec&) = default;
};

/// Shared memory of a block: Q, in whose place O leaves; then of each slice `stages` times K and V, in whose place it
/// leaves O, references and sums for the others; then P, where warps share rows.
FOVEA_FN constexpr int q_bytes(const ForwardSpec& s) {
  const int pitch = s.in_place ? 0 : pitch_of(s.type, s.head_dim) * (s.halved_q ? 2 : 1);
  return s.block_m * math::larger(pitch, pitch_of(s.type, s.head_dim_v));
}
/// Where warps share columns, steps from where one's begin must not carry.
FOVEA_FN constexpr bool swizzles(const ForwardSpec& s, int dim) {
  return s.swizzled && (s.across == 1 || is_power_of_2(dim));
}
FOVEA_FN constexpr int stage_bytes(const ForwardSpec& s) {
  return tile_bytes(s.type, s.block_n, s.head_dim, swizzles(s, s.head_dim)) +
         tile_bytes(s.type, s.block_n, s.head_dim_v, swizzles(s, s.head_dim_v));
}
FOVEA_FN constexpr int left_pitch(const ForwardSpec& s) { return 4 * s.head_dim_v + 32; }  // rows meet other banks
FOVEA_FN constexpr int slice_bytes(const ForwardSpec& s) {
  return math::larger(s.stages * stage_bytes(s), s.slices > 1 ? s.block_m * left_pitch(s) : 0);
}
FOVEA_FN constexpr int block_bytes(const ForwardSpec& s) {  // and what the threads of a block share
  return 256 + 16 * s.warps * (32 * s.slices + 1) + 4 * s.block_m * s.across + s.slices * (s.mask ? 512 : 0);
}
FOVEA_FN constexpr int shared_bytes(const ForwardSpec& s) {
  return q_bytes(s) + s.slices * slice_bytes(s) + (s.across > 1 ? s.block_m * pitch_of(s.type, s.block_n) : 0) +
         block_bytes(s);
}

struct BackwardSpec {
  Type type = Type::kBFloat16;
  Mma mma = Mma::kHalf16;
  bool async_copy = true;
  int head_dim = 64;    // of q and k, rounded up to whole products
  int head_dim_v = 64;  // of v and out, likewise
  int block_m = 64;     // rows
  int block_n = 128;    // keys
  int warps = 8;
  int stages = 2;              // tiles of rows in flight: 1 or 2, or 3 for the leapfrog
  bool in_place = false;       // q, k, v and dout stay where they lie, and are read there
  bool deterministic = false;  // dq is added up in one order of the key blocks
  bool holds_dq = false;       // a block has all keys of its rows, and their dq in shared memory
  bool split_gqa = false;      // several blocks share out the heads that read their keys, and leave parts of dk and dv
  bool ends_dq = false;        // some blocks turn the sums of dq into dq while others add those of later heads
  bool goes_on = false;        // a block takes one key block after the other, or part of dq, of any heads
  bool band = false;
  bool mask = false;
  bool bias = false;
  Type bias_type = Type::kFloat32;
  bool alibi = false;
  bool softcap = false;
  bool dropout = false;

  FOVEA_FN friend constexpr bool operator==(const BackwardSpec&, const BackwardSpec&) = default;
};

/// Calls f(name, value) for every field.
template <class F>
FOVEA_FN constexpr void each_field(const ForwardSpec& s, F&& f) {
  f("type", s.type), f("mma", s.mma), f("async_copy", s.async_copy);
  f("head_dim", s.head_dim), f("head_dim_v", s.head_dim_v);
  f("block_m", s.block_m), f("block_n", s.block_n), f("warps", s.warps), f("across", s.across);
  f("slices", s.slices), f("stages", s.stages);
  f("spread_copies", s.spread_copies), f("swizzled", s.swizzled), f("in_place", s.in_place);
  f("halved_q", s.halved_q), f("pack_gqa", s.pack_gqa), f("split", s.split);
  f("band", s.band), f("mask", s.mask), f("bias", s.bias), f("bias_type", s.bias_type);
  f("alibi", s.alibi), f("softcap", s.softcap), f("dropout", s.dropout);
}
template <class F>
FOVEA_FN constexpr void each_field(const BackwardSpec& s, F&& f) {
  f("type", s.type), f("mma", s.mma), f("async_copy", s.async_copy);
  f("head_dim", s.head_dim), f("head_dim_v", s.head_dim_v);
  f("block_m", s.block_m), f("block_n", s.block_n), f("warps", s.warps), f("stages", s.stages);
  f("in_place", s.in_place);
  f("deterministic", s.deterministic), f("holds_dq", s.holds_dq), f("split_gqa", s.split_gqa);
  f("ends_dq", s.ends_dq);
  f("goes_on", s.goes_on);
  f("band", s.band), f("mask", s.mask), f("bias", s.bias), f("bias_type", s.bias_type);
  f("alibi", s.alibi), f("softcap", s.softcap), f("dropout", s.dropout);
}

}  // namespace fovea::cuda
