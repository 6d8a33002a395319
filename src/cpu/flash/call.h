#pragma once

#include <cstddef>
#include <cstdint>

#include "math/band.h"
#include "math/views.h"

// What the code compiled per instruction set is called with.  Plain values and pointers only: code for different
// instruction sets includes this header, so it must not have any function that the linker could share among them.
namespace fovea::cpu {

using math::Interval;

enum class Element : int { kFloat32, kFloat16, kBFloat16 };

/// One sequence: where its rows lie and what they may see.
struct Sequence {
  i64 q_begin = 0, q_rows = 0;    // rows of out to be written; band.seqlen_q of them are real
  i64 kv_begin = 0, kv_rows = 0;  // rows of dk and dv to be written; band.seqlen_kv of them are real
  i64 first_group = 0;            // backward: row groups of all sequences before this one
  math::Band band;
};

struct FlashCall {
  Element type = Element::kFloat32;
  i64 batch = 0, q_heads = 0, kv_heads = 0, head_dim = 0, head_dim_v = 0;
  const Sequence* sequences = nullptr;
  RowView q, k, v, out, dout, dq, dk, dv;
  StatView lse, dlse;

  float scale = 1.0F, softcap = 0.0F;
  EntryView mask, bias, dbias;
  Element bias_type = Element::kFloat32;
  bool alibi = false;
  HeadView slopes, dslopes;  // slopes given where alibi is
  const float* sink = nullptr;
  float* dsink = nullptr;
  std::uint32_t keep_threshold = 65536;  // of 65536; 65536: no dropout
  std::uint64_t seed = 0, offset = 0;
};

/// Sizes of one forward: tasks of block_rows rows (query × head of one kv head's group) by key_splits parts of the
/// keys.  Blocks that are claimed last are tasks of piece_rows rows each, so that threads end together.
struct ForwardShape {
  i64 max_rows = 0, block_rows = 0, blocks = 0, key_splits = 1;
  i64 piece_rows = 0, cut_blocks = 0;
  bool pairs = false;      // bf16 is multiplied as pairs
  i64 row_lanes = 0;       // with few rows, which share a vector: the lanes that have a row's scores; else 0
  i64 heads_a_task = 1;    // all with few rows and threads: heads mostly lie side by side, and keys are read in order
  i64 keys_per_split = 0;  // a multiple of the key block
  int workers = 1;
};

/// Sizes of one backward: tasks of block_keys keys walk row groups of kGroupRows.
struct BackwardShape {
  i64 max_queries = 0, max_keys = 0, block_keys = 0, blocks = 0, max_groups = 0, total_groups = 0;
  bool pairs = false;    // bf16 is multiplied as pairs
  i64 bias_sharers = 0;  // tasks that add to an entry of dbias; 0: its gradient takes a pass of its own
  int workers = 1;
};

/// The functions of one instruction set.  With a null workspace, forward and backward only return how many bytes they
/// need.
struct FlashKernels {
  int panel_rows;     // rows that one panel of vectors holds
  bool pairs;         // whether bf16 can be multiplied in pairs; all else is multiplied as floats
  i64 rows_in_place;  // up to so many rows reading bf16 where it lies is faster than packing it in pairs
  std::size_t (*forward)(const FlashCall&, const ForwardShape&, std::byte* workspace);
  std::size_t (*backward)(const FlashCall&, const BackwardShape&, std::byte* workspace);
  double (*multiply_add)(i64 rounds);        // runs independent FMAs, returns how many FLOPs that was
  double (*multiply_add_pairs)(i64 rounds);  // the same with pairs of bf16; as floats where there are none
  void (*exp2)(float* x, i64 count);         // in place, for tests; a whole number of vectors of any ISA: 16
};

namespace portable {
extern const FlashKernels kernels;
}
namespace avx2 {
extern const FlashKernels kernels;
}
namespace avx512 {
extern const FlashKernels kernels;
}
namespace avx512_bf16 {
extern const FlashKernels kernels;
}
namespace amx {
extern const FlashKernels kernels;
}

// Multiples of 16, the keys of a patch of dropout draws, and of the rows that a product holds in registers.
inline constexpr i64 kKeyTile = 96;             // keys of one tile in the backward
inline constexpr i64 kBiasKeys = 4 * kKeyTile;  // the most of a task that sums dS of a bias
inline constexpr i64 kForwardKeys = 96;         // keys of one tile in the forward
inline constexpr i64 kGroupRows = 96;           // rows of one tile in the backward; a multiple of every panel's rows
/// With few rows: keys whose scores are made before their values are read, of all heads of a task.
inline constexpr i64 kJoinedKeys = 32;

}  // namespace fovea::cpu
