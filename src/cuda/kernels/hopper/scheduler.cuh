#pragma once

#include "cuda/kernels/hopper/tensor_copy.cuh"
#include "cuda/kernels/scores.cuh"

// Which tile of rows a block works on, and what is to be known of it.  Blocks stay for the whole launch; each begins
// with the tile of its number and then draws the next one, late.
namespace fovea::cuda {

/// The number of the next tile to be had.  The word is in a workspace that may hold anything, so whoever comes first
/// begins it; whoever is the last to find nothing left clears it, so that the next launch, or the next replay of a
/// graph, begins it anew.
struct Tickets {
  static constexpr int kBits = 24;
  static constexpr u64 kBegun = 0x9e3779b97fUL << kBits;  // above the number

  /// After `tile`; a block's first one is that of its number.
  FOVEA_DEVICE static int next(const ForwardSm90Params& p, int tile) {
    auto* const word = reinterpret_cast<unsigned long long*>(p.ticket);
    if (tile == static_cast<int>(blockIdx.x)) {
      const u64 now = *static_cast<volatile u64*>(p.ticket);
      if (now >> kBits != kBegun >> kBits) atomicCAS(word, now, kBegun | gridDim.x);
    }
    return static_cast<int>(static_cast<u32>(atomicAdd(word, 1ULL)) & ((1U << kBits) - 1));
  }
  /// By who has drawn `tile`, where there are only `tiles`.
  FOVEA_DEVICE static void end(const ForwardSm90Params& p, int tile, int tiles) {
    if (tile == tiles + static_cast<int>(gridDim.x) - 1) *static_cast<volatile u64*>(p.ticket) = 0;
  }
};

/// Packed sequences have their tiles one after the other, as many as their rows fill.  Where a thread is among them,
/// whose numbers only grow.
struct PackedTiles {
  int batch, first;  // a sequence, and the number of its first tile; behind the last one, how many tiles there are
  int row_blocks;    // of it

  template <ForwardSm90Spec S>
  FOVEA_DEVICE bool find(const ForwardSm90Params& p, int tile) {
    for (; batch < p.batch; ++batch) {
      row_blocks = (Sequence::of(p, batch).q_rows + block_m(S) - 1) / block_m(S);
      if (tile < first + row_blocks * p.q_heads) return true;
      first += row_blocks * p.q_heads;
    }
    return false;
  }
};

/// A tile of rows of one head.
template <ForwardSm90Spec S>
struct Work {
  Sequence sequence;
  RowMap<false> rows;
  int kv_head;
  Interval tiles;                   // of keys, that any row sees any of
  Band::Reach reach[S.warpgroups];  // of each warpgroup's rows
  math::DropoutStream stream;

  /// Of the block's tiles of keys, those that a warpgroup's rows see any of.
  FOVEA_DEVICE Interval tiles_of(int group) const {
    const Band::Reach& seen = reach[group];
    if (seen.any_end <= seen.any_begin) return {tiles.begin, tiles.begin};
    return {seen.any_begin / S.block_n, (seen.any_end - 1) / S.block_n + 1};
  }
  FOVEA_DEVICE TileState band_of(int group, int tile) const {
    return reach[group].tile({tile * S.block_n, tile * S.block_n + S.block_n});
  }

  /// The tile of this number, if there is one.  The rows that see the most under a causal rule come first.
  FOVEA_DEVICE bool find(const ForwardSm90Params& p, int tile, PackedTiles& packed) {
    const bool is_packed = p.cu_seqlens_q.data != nullptr, batch_inside = p.batch_inside && !is_packed;
    if (is_packed ? !packed.find<S>(p, tile) : tile >= p.tiles) return false;
    const int inside = batch_inside ? p.batch : p.q_heads, outside = batch_inside ? p.q_heads : p.batch;
    const int row_blocks = is_packed ? packed.row_blocks : p.row_blocks;
    const auto [outer, inner, turn] =
        HeadTurn::of(tile - packed.first, p.heads_abreast, row_blocks, inside, is_packed ? 1 : outside);
    const int batch = batch_inside ? inner : outer + packed.batch, head = batch_inside ? outer : inner;
    sequence = Sequence::of(p, batch);
    rows = {(row_blocks - 1 - turn) * block_m(S), sequence.q_rows, head, 1};
    asm volatile("" ::: "memory");  // what is known lies in shared memory: registers are few
    kv_head = head / p.group;
    const Interval keys = sequence.band.keys_of_rows(rows.queries(0, block_m(S)));
    tiles.begin = keys.begin / S.block_n;
    tiles.end = keys.empty() ? tiles.begin : (keys.end - 1) / S.block_n + 1;
#pragma unroll 1
    for (int g = 0; g < S.warpgroups; ++g) {
      const Interval mine = rows.queries(g * kGroupRows, (g + 1) * kGroupRows);
      reach[g] = mine.empty() ? Band::Reach{} : sequence.band.reach(mine);
    }
    if constexpr (S.dropout)
      stream = math::dropout_stream(p.seed, p.offset, static_cast<u32>(batch * p.q_heads + head));
    return true;
  }
};

}  // namespace fovea::cuda
