#pragma once

#include "cuda/kernels/hopper/tensor_copy.cuh"
#include "cuda/kernels/scores.cuh"

// Which tile of rows a block works on.  Blocks are persistent: each begins with the tile of its own number and then
// claims the next one, as late as it can without waiting.
namespace fovea::cuda {

/// The counter of claimed tiles.  It is in a workspace with any content, so the first block to come initialises it; the
/// last one to find no tile left clears it, so that the next launch, or replay of a graph, starts anew.
struct Tickets {
  static constexpr int kBits = 24;
  static constexpr u64 kBegun = 0x9e3779b97fUL << kBits;  // the upper bits of an initialised counter

  /// Claims the tile after `tile`; a block's first one is that of its own number.
  FOVEA_DEVICE static int next(const ForwardSm90Params& p, int tile) {
    auto* const word = reinterpret_cast<unsigned long long*>(p.ticket);
    if (tile == static_cast<int>(blockIdx.x)) {
      const u64 now = *static_cast<volatile u64*>(p.ticket);
      if (now >> kBits != kBegun >> kBits) atomicCAS(word, now, kBegun | gridDim.x);
    }
    return static_cast<int>(static_cast<u32>(atomicAdd(word, 1ULL)) & ((1U << kBits) - 1));
  }
  /// For a block that has claimed `tile`, beyond the last of `tiles`.
  FOVEA_DEVICE static void end(const ForwardSm90Params& p, int tile, int tiles) {
    if (tile == tiles + static_cast<int>(gridDim.x) - 1) *static_cast<volatile u64*>(p.ticket) = 0;
  }
};

template <ForwardSm90Spec S>
inline constexpr Packing kPacking = S.pack_gqa ? Packing::kPowerOf2 : Packing::kNone;
/// The logarithm of how many rows a query has in a tile.
template <ForwardSm90Spec S>
FOVEA_DEVICE int packed_bits(const ForwardSm90Params& p) {
  return S.pack_gqa ? p.packed_bits : 0;
}

/// Packed sequences have their tiles one after the other, as many as their rows fill.  A search among them for tiles of
/// growing numbers.
struct PackedTiles {
  int batch, first;  // a sequence and the number of its first tile; after the last one `first` is the number of tiles
  int row_blocks;    // of the sequence

  template <ForwardSm90Spec S>
  FOVEA_DEVICE bool find(const ForwardSm90Params& p, int tile) {
    for (; batch < p.batch; ++batch) {
      row_blocks = ((Sequence::of(p, batch).q_rows << packed_bits<S>(p)) + block_m(S) - 1) / block_m(S);
      if (tile < first + row_blocks * p.heads) return true;
      first += row_blocks * p.heads;
    }
    return false;
  }
};

/// Which of the parts of a tile's keys.
template <bool kSplit>
struct KeySplit {};
template <>
struct KeySplit<true> {
  int split;
};

/// A tile of rows of one head, or of several that share their keys.
template <ForwardSm90Spec S>
struct Work : KeySplit<S.split> {
  Sequence sequence;
  RowMap<kPacking<S>> rows;
  int kv_head;
  Interval tiles;                   // of keys, of which some row sees some
  Band::Reach reach[S.warpgroups];  // of each warpgroup's rows
  math::DropoutStream stream;

  /// The tiles of keys of which a warpgroup's rows see some.
  FOVEA_DEVICE Interval tiles_of(int group) const {
    const Band::Reach& seen = reach[group];
    if (seen.any_end <= seen.any_begin) return {tiles.begin, tiles.begin};
    const Interval own{seen.any_begin / S.block_n, (seen.any_end - 1) / S.block_n + 1};
    if constexpr (!S.split) return own;
    const Interval part{math::larger(own.begin, tiles.begin), math::smaller(own.end, tiles.end)};
    return part.empty() ? Interval{tiles.begin, tiles.begin} : part;
  }
  FOVEA_DEVICE TileState band_of(int group, int tile) const {
    return reach[group].tile({tile * S.block_n, tile * S.block_n + S.block_n});
  }

  /// Becomes the tile of this number; false where there is none.  Rows that see the most come first.
  FOVEA_DEVICE bool find(const ForwardSm90Params& p, int number, PackedTiles& packed) {
    const int tile = S.split ? number / p.splits : number;
    const bool is_packed = p.cu_seqlens_q.data != nullptr, batch_inside = p.batch_inside && !is_packed;
    if (is_packed ? !packed.find<S>(p, tile) : number >= p.tiles) return false;
    const int inside = batch_inside ? p.batch : p.heads, outside = batch_inside ? p.heads : p.batch;
    const int row_blocks = is_packed ? packed.row_blocks : p.row_blocks;
    const auto [outer, inner, turn] =
        HeadTurn::of(tile - packed.first, p.heads_abreast, row_blocks, inside, is_packed ? 1 : outside);
    const int batch = batch_inside ? inner : outer + packed.batch, head = batch_inside ? outer : inner;
    sequence = Sequence::of(p, batch);
    rows = {(row_blocks - 1 - turn) * block_m(S), sequence.q_rows << packed_bits<S>(p), head, {1}};
    if constexpr (S.pack_gqa) rows.first_head *= p.packed_heads, rows.group = {p.packed_heads, p.packed_bits};
    asm volatile("" ::: "memory");  // *this is in shared memory and is not to be kept in registers
    kv_head = rows.first_head / p.group;
    const Interval keys = sequence.band.keys_of_rows(rows.queries(0, block_m(S)));
    tiles.begin = keys.begin / S.block_n;
    tiles.end = keys.empty() ? tiles.begin : (keys.end - 1) / S.block_n + 1;
    if constexpr (S.split) {
      this->split = number - tile * p.splits;
      const int begin = tiles.begin;
      const i64 all = tiles.end - begin;
      const auto part = [&](int split) { return begin + static_cast<int>(all * split / p.splits); };
      tiles = {part(this->split), part(this->split + 1)};
    }
#pragma unroll 1
    for (int g = 0; g < S.warpgroups; ++g) {
      const Interval queries = rows.queries(g * kGroupRows, (g + 1) * kGroupRows);
      reach[g] = queries.empty() ? Band::Reach{} : sequence.band.reach(queries);
    }
    if constexpr (S.dropout)
      stream = math::dropout_stream(p.seed, p.offset, static_cast<u32>(batch * p.q_heads + head));
    return true;
  }
};

/// Where the copy engine finds rows from r on of a tile.
template <ForwardSm90Spec S>
FOVEA_DEVICE auto place_of_rows(const Work<S>& work, int r, int batch) {
  const RowPlace place{work.sequence.q_begin + work.rows.query(r), work.rows.first_head, batch};
  if constexpr (S.pack_gqa) {
    return PackedPlace{place};
  } else {
    return place;
  }
}

}  // namespace fovea::cuda
