#pragma once

#include "cuda/params.h"

// What a kernel of the Hopper family is called with.  Host and device compile this text.
namespace fovea::cuda {

/// CUtensorMap: where the copy engine finds a tensor and how it cuts it into boxes.
struct alignas(64) TensorMap {
  u64 words[16];
};

struct ForwardSm90Params : CallParams {
  TensorMap q_map, k_map, v_map;  // [batch][head][row][column]
  TensorMap bias_map;             // [batch][head][query][key], any but the last one long where broadcast
  TensorMap out_map;              // as q's, in boxes of a warp's rows
  RowView out;
  StatView lse;
  bool by_engine;  // the copy engine can read q, k and v
  bool bias_by_engine;
  bool out_by_engine;
  int row_blocks;     // of the longest sequence
  int tiles;          // of rows: row_blocks × heads × batch; times `splits`
  int heads_abreast;  // heads, of any sequences, whose tiles take turns
  bool batch_inside;  // they are one head's of all sequences, then the next one's
  u32 clocks_apart;   // from a block's beginning to the next one's
  u64* ticket;        // `Tickets`
  int splits;         // blocks that share out the keys of a tile of rows
  float* partials;    // as in ForwardParams
  int packed_heads;   // whose rows a tile has together, as if they were 2^packed_bits
  int packed_bits;
  int heads;  // q_heads, or as many times fewer
};

struct BackwardSm90Params : BackwardParams {
  TensorMap q_map, k_map, v_map, dout_map;  // [batch][head][row][column]
  bool by_engine;                           // the copy engine can read all four
  bool bias_by_engine;
  TensorMap bias_map;  // as the forward's
  int slot_rows;       // of a slot
  u32 bias_tiles;      // of dbias, which its gradient's blocks share out
  TensorMap dbias_map;
  bool dbias_by_engine;
  int tasks;  // of blocks that go on
};

}  // namespace fovea::cuda
