#pragma once

#include "cuda/params.h"
#include "cuda/spec.h"

// What the rungs' kernels are compiled for and called with, and how they cut their work.  Host and device compile this
// text.
namespace fovea::ladder {

using math::i64;

/// What a kernel is compiled for.
struct Spec {
  cuda::Type type = cuda::Type::kBFloat16;
  cuda::Mma mma = cuda::Mma::kHalf16;
  bool async_copy = true;
  int head_dim = 64;                       // 64 or 128
  static constexpr bool in_place = false;  // operands lie in shared memory
};

struct Params {
  RowView q, k, v, out, dout, dq, dk, dv;
  StatView lse, dlse;
  int heads;  // of a batch element
  int seqlen_q, seqlen_kv;
  int diagonal;  // row i sees keys up to i + diagonal; seqlen_kv where it sees all
  float scale;
  // In the workspace, a (batch, head) after the other.
  float* scores;  // rung 0: S, then dP: [seqlen_q, pitch]
  char* weights;  // rung 0: P, then dS, in the dtype: [seqlen_q, pitch]
  i64 pitch;      // seqlen_kv, rounded up to whole tiles
  float* o;       // rungs 1 and 2: O between blocks of keys: [seqlen_q, head_dim]
  float* maxima;  // rungs 1 and 2: m of each row, in units of log2
  float* sums;    // rungs 1 and 2: l of each row
  float* dq_sum;  // rungs 1 to 3: [seqlen_q, head_dim]
  float* delta;   // rungs 1 to 3: of each row
};

/// The matrix products of rung 0.
enum class Product : int { kScores, kOut, kWeightGradients, kDq, kDk, kDv };

/// Rung 0: tiles of a product, threads of any block.
inline constexpr int kProductTile = 64, kFormulaThreads = 128;

/// Rungs 1 and 2: 16 queries at a time against a block of keys, of which each of 4 warps has a slice.
inline constexpr int kSlicedRows = 16, kSlicedWarps = 4, kSlicedThreads = 32 * kSlicedWarps;
inline constexpr int kSlicedKeys = 128;  // forward
FOVEA_FN constexpr int sliced_keys_backward(int head_dim) { return 8192 / head_dim; }
inline constexpr int kSequenceRows = 128;  // rung 2: queries of a block, forward

/// Rung 3: queries of a tile, keys of a tile.
inline constexpr int kSplitRows = 128, kSplitThreads = 128;
FOVEA_FN constexpr int split_keys(int head_dim) { return 4096 / head_dim; }
inline constexpr int kSplitRowsBackward = 64, kSplitKeysBackward = 128, kSplitThreadsBackward = 256;

/// Kernels around the backward of rungs 1 to 3: a thread has 8 elements of a row.
inline constexpr int kAroundThreads = 256;
FOVEA_FN constexpr int around_rows(int head_dim) { return kAroundThreads / (head_dim / 8); }

// Dynamic shared memory of a block, in bytes.
inline constexpr int kFormulaShared = 4 * kProductTile * kProductTile * 2, kFormulaRowShared = kFormulaThreads / 32 * 4;
FOVEA_FN constexpr int partial_bytes(int head_dim) { return kSlicedWarps * kSlicedRows * (head_dim + 8) * 4; }
FOVEA_FN constexpr int sliced_shared(int head_dim) {
  return (2 * kSlicedKeys + 2 * kSlicedRows) * head_dim * 2 + partial_bytes(head_dim) +
         2 * kSlicedWarps * kSlicedRows * 4;
}
inline constexpr int kTransposedPitch = 48;  // bytes between the rows of dS of one warp
FOVEA_FN constexpr int sliced_shared_backward(int head_dim) {
  return (2 * sliced_keys_backward(head_dim) + 4 * kSlicedRows) * head_dim * 2 + partial_bytes(head_dim) +
         sliced_keys_backward(head_dim) * kTransposedPitch + 4 * kSlicedRows * 4;
}
FOVEA_FN constexpr int split_shared(int head_dim) { return (kSplitRows + 4 * split_keys(head_dim)) * head_dim * 2; }
FOVEA_FN constexpr int split_shared_backward(int head_dim) {
  return (2 * kSplitKeysBackward + 4 * kSplitRowsBackward) * head_dim * 2 +
         2 * kSplitRowsBackward * kSplitKeysBackward * 2 + 4 * kSplitRowsBackward * 4;
}

}  // namespace fovea::ladder
