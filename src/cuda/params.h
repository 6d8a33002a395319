#pragma once

#include "math/band.h"
#include "math/views.h"

// What a GPU kernel is called with: run-time values.  Host and device compile this text.
namespace fovea::cuda {

/// How the bits of a mask lie in words of each sequence and head.
enum class WordOrder {
  kRows,     // [32 keys][row]
  kLanes,    // [128 keys][row][4]: for each of the four lanes that share a row of an accumulator its entries, in order
  kColumns,  // [64 rows][16 keys][lane]: a warp's entries of a transposed tile, whose rows are keys; bit 16 (j / 4) +
             // 8 (e % 2) + 2 (j % 4) + e / 2
};

/// A mask as words of 32 bits, and after each head a summary: two words for each 32 rows of 32 times 32 keys
/// (`mask_tile`).  Strides in words, 0 where broadcast.
struct WordView {
  u32* data;
  i64 batch, head, row;
  int rows, count;    // rows that there are words of; count: words of a row
  int heads, planes;  // heads, and sequences × heads, that have words of their own
  WordOrder order;

  FOVEA_FN constexpr int groups() const { return (rows + 31) / 32; }
  FOVEA_FN constexpr int spans() const { return (count + 31) / 32; }
  FOVEA_FN constexpr i64 plane() const { return (i64{rows} * count + i64{2} * groups() * spans() + 3) / 4 * 4; }
};

inline constexpr int kMaskThreads = 256;  // of a block of `mask_words`

/// Rows, and where copies of them go: `written` bytes each, of which the first `bytes` are copied and the others 0.
struct RowCopy {
  RowView from, to;
  int planes, heads;  // planes: heads × sequences
  int rows, chunks;   // chunks: of a row
  int bytes, written;
  bool in_words;  // all rows begin, and end, at multiples of 4 bytes
};
inline constexpr int kMostCopies = 5;
struct CopyRowsParams {
  RowCopy copies[kMostCopies];
};
inline constexpr int kCopyThreads = 256, kCopiedRows = 32, kCopiedBytes = 512;  // of a block

/// int32 values on the device; data null: none.
struct IndexView {
  const int* data;
  i64 stride;
};

/// log2 e · softcap · tanh(s · scale / softcap) is s · Σ terms[i] · (s² + square)ⁱ where s² is below `square`, a power
/// of 2.
struct CappedExponent {
  float square, terms[7];  // 32 bytes, or what lies behind is loaded in other pieces (some kernels spill more then)
};

/// What forward and backward both need to know.
struct CallParams {
  int batch, q_heads, kv_heads, group;  // group: q_heads / kv_heads
  bool in_pieces;                       // rows of k and v are whole pieces of 16 bytes, less than 4 GiB apart
  int head_dim, head_dim_v;             // not rounded up
  int seqlen_q, seqlen_kv;              // packed: of the longest sequence
  int total_q, total_kv;                // packed: all rows
  math::BandRule band;
  IndexView q_lengths, kv_lengths, cu_seqlens_q, cu_seqlens_kv;
  RowView q, k, v;
  EntryView mask, bias;
  WordView mask_words;
  bool bias_in_runs;  // 8 keys of it are neighbours and can be read in loads of up to 16 bytes
  HeadView slopes;
  const float* sink;  // [head]
  float scale, softcap, per_softcap;
  // Below small_score, tanh(s · scale / softcap) is s · Σ small_terms[i] · s²ⁱ.
  float small_score, small_terms[4];
  CappedExponent few_terms, more_terms;  // 3 and 6, for scores to 0.17 and 0.54 of the softcap at least
  u32 keep_threshold;                    // draws below it, of 65536, keep their entry
  float keep_scale;                      // that kept entries are multiplied by
  u64 seed, offset;
};

struct ForwardParams : CallParams {
  RowView out;
  StatView lse;
  int row_blocks;      // of a sequence; of packed ones, together, as in `PackedBlock`
  int heads_abreast;   // heads, of any sequences, whose blocks take turns in the grid
  int v_chunks;        // blocks that share out the columns of v
  int v_columns;       // of such a block
  int splits;          // parts of the keys
  int keys_per_split;  // a multiple of block_n
  float* partials;     // [batch][head][row][chunk][split][v_columns + kPartFacts]: O, its reference in units of log2
};

inline constexpr int kMostSplits = 128;  // and threads of a block that combines a row
inline constexpr int kWarpSplits = 32;   // up to which a warp may combine one
inline constexpr int kPartFacts = 4;     // floats behind O in a part of a row: reference, sum, and up to 16 bytes

struct BackwardParams : CallParams {
  RowView out, dout, dq, dk, dv;
  StatView lse, dlse;
  EntryView dbias;
  HeadView dslopes;
  float* dsink;
  int row_blocks, key_blocks;  // of the longest sequence
  int row_slots;               // of blocks of rows, all sequences together; of packed ones `PackedBlock`
  int key_lines;               // of blocks of a kv head: `BlockTask`
  int heads_abreast;           // kv heads, of any sequences, whose blocks take turns in the grid
  // Where blocks end dq:
  int dq_places;  // kv heads that dq_sum has room for
  int dq_parts;   // blocks that share the conversion of one kv head's dq
  int dq_lag;     // turns by which these blocks follow the blocks of their kv head
  // In the workspace; slots: `RowSlots`.
  float* log2_lse;  // [head][slot][row of block_m]; +infinity where a row sees nothing
  float* delta;     // likewise: Σ dout·out − dlse
  float* dq_sum;    // [head][slot][block_m × head_dim, as accumulators lie in warps]; where blocks end dq `DqPlaces`
  int* tickets;     // [head][slot] key blocks that have added to dq, where their order matters
  int* begun;       // blocks that have, where one waits for others
  int* added;       // [turn of a kv head] blocks that have added all that they add to its dq, then those that ended it
  float* sink_parts;   // [head][slot]
  float* slope_parts;  // [batch][head][key block][warp]
  float* bias_sums;    // [part][tile of dbias][entry], as in `BiasTile`
  int bias_parts;      // blocks that share out what flows into a tile of dbias; 1: and write it
  bool batch_inside;   // those abreast are one head's of all sequences, then the next one's
  // With split_gqa: blocks that share out the heads of a group, each as if these were a group with a kv head of their
  // own.  `kv_heads` and `group` count so, and these are fp32, for each of those heads.
  int group_parts;
  RowView dk_parts, dv_parts;
};

}  // namespace fovea::cuda
