#pragma once

#include "cuda/kernels/hopper/tensor_copy.cuh"
#include "cuda/kernels/scores.cuh"

// Which tile of rows a block works on, and what is to be known of it.  Blocks stay for the whole launch; each begins
// with the tile of its number and then draws the next one, late.
namespace fovea::cuda {

/// The next tile to be had.  The word is in a workspace that may hold anything, so whoever comes first begins it;
/// whoever is the last to find nothing left clears it, so that the next launch, or the next replay of a graph, begins
/// it anew.
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
    const u32 drawn = static_cast<u32>(atomicAdd(word, 1ULL)) & ((1U << kBits) - 1);
    if (drawn == static_cast<u32>(p.tiles) + gridDim.x - 1) *static_cast<volatile u64*>(p.ticket) = 0;
    return static_cast<int>(drawn);
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

  /// The rows that see the most under a causal rule come first.
  FOVEA_DEVICE void find(const ForwardSm90Params& p, int tile) {
    const int inside = p.batch_inside ? p.batch : p.q_heads, outside = p.batch_inside ? p.q_heads : p.batch;
    const auto [outer, inner, turn] = HeadTurn::of(tile, p.heads_abreast, p.row_blocks, inside, outside);
    const int batch = p.batch_inside ? inner : outer, head = p.batch_inside ? outer : inner;
    sequence = Sequence::of(p, batch);
    rows = {(p.row_blocks - 1 - turn) * block_m(S), sequence.q_rows, head, 1};
    if (rows.left() <= 0) return;
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
  }
};

}  // namespace fovea::cuda
