#pragma once

#include "cuda/kernels/mask_tiles.cuh"
#include "cuda/kernels/operands.cuh"

// The walk over all tiles of dS that add to a tile of dbias, in the order of the additions.
namespace fovea::cuda {

/// A tile of dbias, or a part of its walk.
template <BackwardSpec S>
struct BiasTile {
  const BackwardParams& p;
  int key_tile, row_tile, head, batch, part;

  /// Tiles are numbered part by part, by key tiles × row tiles × heads × batch of dbias; 1 where it is broadcast.
  FOVEA_DEVICE BiasTile(const BackwardParams& params, int number) : p(params) {
    const auto take = [&number](i64 stride, int count) {
      if (stride == 0) return 0;
      const int index = number % count;
      number /= count;
      return index;
    };
    key_tile = take(p.dbias.key, p.key_blocks), row_tile = take(p.dbias.query, p.row_blocks);
    head = take(p.dbias.head, p.q_heads), batch = take(p.dbias.batch, p.batch);
    part = number;
  }

  FOVEA_DEVICE bool own_row() const { return p.dbias.query != 0; }
  FOVEA_DEVICE bool own_key() const { return p.dbias.key != 0; }
  /// Its entries that exist, and the distance of its rows in a part.
  FOVEA_DEVICE int rows() const { return own_row() ? math::smaller(S.block_m, p.seqlen_q - row_tile * S.block_m) : 1; }
  FOVEA_DEVICE int keys() const { return own_key() ? math::smaller(S.block_n, p.seqlen_kv - key_tile * S.block_n) : 1; }
  FOVEA_DEVICE int pitch() const { return own_key() ? S.block_n : 1; }
  FOVEA_DEVICE int entries() const { return bias_entries(S, own_row(), own_key()); }

  FOVEA_DEVICE void write_entry(int i, int j, double x) const {
    char* to = p.dbias.data + batch * p.dbias.batch + head * p.dbias.head +
               (i64{row_tile} * S.block_m + i) * p.dbias.query + (i64{key_tile} * S.block_n + j) * p.dbias.key;
    write<S.bias_type>(to, static_cast<float>(x));
  }
};

/// A step of the walk: a tile of rows and one of keys.
struct BiasStep {
  Sequence sequence;
  int head, row_tile, key_tile, end_key_tile;
  i64 left;                 // steps left, this one included; 0: the walk is over
  bool new_rows, new_keys;  // other ones than in the step before
  Sight sight;
};

/// Walks what adds to a tile of dbias, or a part of it, in the order of sequences, heads, rows and keys, so that tiles
/// of rows or keys are copied only when they change.  In shared memory, updated by one thread, to save registers.
template <BackwardSpec S>
struct BiasWalk {
  const BackwardParams& p;
  const BiasTile<S> to;

  FOVEA_DEVICE static Interval range(bool own, int at, int count) {
    return own ? Interval{at, at + 1} : Interval{0, count};
  }
  FOVEA_DEVICE Interval batches() const { return range(p.dbias.batch != 0, to.batch, p.batch); }
  FOVEA_DEVICE Interval heads() const { return range(p.dbias.head != 0, to.head, p.q_heads); }
  FOVEA_DEVICE static Interval tiles_of(Interval seen, int size) {
    return seen.empty() ? Interval{0, 0} : Interval{seen.begin / size, (seen.end - 1) / size + 1};
  }
  FOVEA_DEVICE Interval rows(const Sequence& sequence) const {
    if (to.own_row() || !to.own_key())
      return range(to.own_row(), to.row_tile, (sequence.q_rows + S.block_m - 1) / S.block_m);
    const int key = to.key_tile * S.block_n;
    return tiles_of(sequence.band.rows_of_keys({key, key + S.block_n}), S.block_m);
  }
  FOVEA_DEVICE Interval keys(const Sequence& sequence, int row_tile) const {
    const int row = row_tile * S.block_m;
    const Interval tiles = tiles_of(sequence.band.keys_of_rows({row, row + S.block_m}), S.block_n);
    if (!to.own_key()) return tiles;
    return tiles.contains(to.key_tile) ? Interval{to.key_tile, to.key_tile + 1} : Interval{0, 0};
  }
  FOVEA_DEVICE i64 steps_of_head(const Sequence& sequence) const {
    i64 steps = 0;
    for (int r = rows(sequence).begin; r < rows(sequence).end; ++r) {
      const Interval tiles = keys(sequence, r);
      steps += tiles.end - tiles.begin;
    }
    return steps;
  }
  FOVEA_DEVICE i64 steps_of_heads(const Sequence& sequence) const {
    return steps_of_head(sequence) * (heads().end - heads().begin);
  }
  /// By a warp, whose lanes share out the sequences.
  FOVEA_DEVICE i64 steps_of_tile() const {
    i64 steps = 0;
    for (int b = batches().begin + lane_id(); b < batches().end; b += kWarp)
      steps += steps_of_heads(Sequence::of(p, b));
    for (int lane = 1; lane < kWarp; lane *= 2) steps += __shfl_xor_sync(kAllLanes, steps, lane);
    return steps;
  }

  /// By a warp: the first step.
  FOVEA_DEVICE void begin(BiasStep& first) const {
    i64 skipped = 0, end = i64{1} << 62;
    if (p.bias_parts > 1) {
      const i64 steps = steps_of_tile();
      skipped = steps * to.part / p.bias_parts, end = steps * (to.part + 1) / p.bias_parts;
    }
    if (lane_id() != 0) return;
    BiasStep at{Sequence::of(p, batches().begin), heads().begin, 0, 0, 0, end - skipped, true, true, {}};
    if (at.left > 0 && skipped > 0) {
      for (i64 here = steps_of_heads(at.sequence); skipped >= here; here = steps_of_heads(at.sequence)) {
        skipped -= here;
        at.sequence = Sequence::of(p, at.sequence.batch + 1);
      }
      const i64 of_head = steps_of_head(at.sequence);
      at.head += static_cast<int>(skipped / of_head);
      skipped %= of_head;
    }
    enter(at, rows(at.sequence).begin);
    for (; at.left > 0 && skipped >= at.end_key_tile - at.key_tile; next_rows(at))
      skipped -= at.end_key_tile - at.key_tile;
    at.key_tile += static_cast<int>(skipped);
    find_seen(at);
    first = at;
  }
  /// By a thread.
  FOVEA_DEVICE BiasStep after(BiasStep at) const {
    const int row_tile = at.row_tile, key_tile = at.key_tile, head = at.head, batch = at.sequence.batch;
    ++at.key_tile, --at.left;
    find_seen(at);
    const bool same_batch = at.sequence.batch == batch;
    at.new_rows = !same_batch || at.head != head || at.row_tile != row_tile;
    at.new_keys = !same_batch || at.head / p.group != head / p.group || at.key_tile != key_tile;
    return at;
  }

 private:
  FOVEA_DEVICE void enter(BiasStep& at, int row_tile) const {
    const Interval tiles = keys(at.sequence, row_tile);
    at.row_tile = row_tile, at.key_tile = tiles.begin, at.end_key_tile = tiles.end;
  }
  FOVEA_DEVICE void next_rows(BiasStep& at) const {
    int row_tile = at.row_tile + 1;
    if (row_tile >= rows(at.sequence).end) {
      if (++at.head >= heads().end) {
        at.head = heads().begin;
        const int batch = at.sequence.batch + 1;
        if (batch >= batches().end) at.left = 0;
        if (batch < batches().end) at.sequence = Sequence::of(p, batch);
      }
      row_tile = rows(at.sequence).begin;
    }
    enter(at, row_tile);
  }
  /// Moves on to the next step of which something is seen, if this one is not.
  FOVEA_DEVICE void find_seen(BiasStep& at) const {
    for (;; ++at.key_tile, --at.left) {
      while (at.left > 0 && at.key_tile >= at.end_key_tile) next_rows(at);
      if (at.left <= 0) return;
      const int row = at.row_tile * S.block_m, key = at.key_tile * S.block_n;
      at.sight.band = at.sequence.band.tile({row, row + S.block_m}, {key, key + S.block_n});
      if constexpr (S.mask)
        at.sight.mask = mask_tile<S.block_n>(p, at.sequence, {at.head, at.head + 1}, {row, row + S.block_m}, key);
      if (!at.sight.hidden()) return;
    }
  }
};

}  // namespace fovea::cuda
