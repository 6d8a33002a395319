#include <algorithm>

#include "ladder.h"
#include "launches.h"

// What the algorithms owe to memory, and to units that do not multiply matrices: counted tile by tile, for one head,
// then multiplied.  A multiply-add is one operation.
namespace fovea::ladder {
namespace {

/// The tiles of a device's pages.
struct Tiles {
  std::int64_t rows, keys, keys_backward;  // of rungs 1 and 2
  std::int64_t split_rows, split_keys, split_keys_backward;
  int shares;  // into which sums of O and dQ are cut

  static Tiles of(const Problem& problem) {
    constexpr std::int64_t kTwin = 64;  // kTile of twin.h
    if (problem.dtype == DType::kFloat32) return {1, kTwin, kTwin, kTwin, kTwin, kTwin, 1};
    const int dim = static_cast<int>(problem.head_dim);
    return {kSlicedRows,        kSlicedKeys, sliced_keys_backward(dim), kSplitRows, ladder::split_keys(dim),
            kSplitKeysBackward, kSlicedWarps};
  }
};

struct Counter {
  const Problem& problem;
  std::int64_t queries = problem.seqlen_q, keys = problem.seqlen_kv;
  double dim = static_cast<double>(problem.head_dim), size = static_cast<double>(size_bytes(problem.dtype));
  std::int64_t diagonal = describe_params(problem).diagonal;
  Tiles tiles = Tiles::of(problem);
  double bytes = 0, other = 0;

  [[nodiscard]] double row_bytes() const { return dim * size; }
  [[nodiscard]] std::int64_t visible_keys(std::int64_t end) const {
    return std::clamp<std::int64_t>(std::min(end, queries) + diagonal, 0, keys);
  }
  /// The first row of a tile of them that sees a key.
  [[nodiscard]] std::int64_t first_row(std::int64_t key, std::int64_t tile) const {
    return std::clamp<std::int64_t>(key - diagonal, 0, queries) / tile * tile;
  }
  [[nodiscard]] double visible() const {
    double sum = 0;
    for (std::int64_t i = 0; i < queries; ++i) sum += static_cast<double>(visible_keys(i + 1));
    return sum;
  }

  /// A kernel of rung 0 that reads and writes so many bytes of each entry, and so many tensors of rows.
  void pass(double entry_bytes, double entry_operations, double query_tensors, double key_tensors) {
    const double n = static_cast<double>(queries), m = static_cast<double>(keys);
    bytes += n * m * entry_bytes + (n * query_tensors + m * key_tensors) * row_bytes();
    other += n * m * entry_operations;
  }
  void formula(bool backward) {
    pass(4, 1, 1, 1);  // S, scaled
    if (!backward) {
      pass(4 + size, 7, 0, 0);  // P: maximum; difference, exponential, sum; the first two again, division
      pass(size, 0, 1, 1);      // O
      return;
    }
    pass(4 + size, 2, 0, 0);      // P: difference, exponential
    pass(size, 0, 1, 1);          // dV
    pass(4, 0, 1, 1);             // dP
    pass(4 + 2 * size, 4, 0, 0);  // dS: product and sum of delta; difference, product
    pass(size, 0, 1, 1);          // dQ
    pass(size, 0, 1, 1);          // dK
  }

  /// Keys outside: `part` queries past all keys.
  void flash(std::int64_t part) {
    const double kept = 4 * dim + 8;  // of a row between blocks of keys: O, m, l
    for (std::int64_t first = 0; first < queries; first += part) {
      const std::int64_t end = std::min(first + part, queries);
      // All rows are written with the first block of keys, those that see nothing too.
      for (std::int64_t key = 0; key == 0 || key < visible_keys(end); key += tiles.keys) {
        const double rows =
            static_cast<double>(key == 0 ? end - first : end - std::max(first, first_row(key, tiles.rows)));
        const double block = static_cast<double>(std::min(tiles.keys, keys - key));
        bytes += 2 * block * row_bytes() + rows * (row_bytes() + 2 * kept);
        // Scale, maximum, difference, exponential, sum; and of O, shares put together, two products and a division.
        other += rows * (5 * block + (tiles.shares - 1 + 3) * dim);
      }
    }
    bytes += static_cast<double>(queries) * (row_bytes() + 4 - 2 * kept);  // neither read at first nor kept at last
  }

  /// Queries outside.
  void flash2() {
    for (std::int64_t first = 0; first < queries; first += tiles.split_rows) {
      const double rows = static_cast<double>(std::min(tiles.split_rows, queries - first));
      const auto seen = static_cast<double>(visible_keys(first + tiles.split_rows));
      bytes += 2 * rows * row_bytes() + 4 * rows + 2 * seen * row_bytes();
      // Maximum, multiply-add, exponential, sum; O is rescaled once a tile.
      other += rows * seen * (4 + dim / static_cast<double>(tiles.split_keys)) + rows * dim;
    }
  }

  /// Blocks of keys, past each the queries; dQ is added to in memory.
  void backward(std::int64_t block_keys, std::int64_t tile, int shares) {
    const auto all = static_cast<double>(queries);
    bytes += all * (2 * row_bytes() + 4 * dim + 4) + all * (4 * dim + row_bytes());  // delta and zeros; dq
    other += all * 3 * dim;
    for (std::int64_t key = 0; key < keys; key += block_keys) {
      const double rows = static_cast<double>(queries - first_row(key, tile));
      const double block = static_cast<double>(std::min(block_keys, keys - key));
      bytes += 4 * block * row_bytes() + rows * (2 * row_bytes() + 8 + 8 * dim);
      other += rows * (4 * block + shares * dim);  // multiply-add, exponential, difference, product; and of dQ
    }
  }
};

}  // namespace

Counts counts(int rung, const Problem& problem, Direction pass) {
  Counter c{problem};
  const bool backward = pass == Direction::kBackward;
  if (rung == 0) c.formula(backward);
  if (rung == 1 && !backward) c.flash(c.queries);
  if (rung == 2 && !backward) c.flash(kSequenceRows);
  if (rung == 3 && !backward) c.flash2();
  if ((rung == 1 || rung == 2) && backward) c.backward(c.tiles.keys_backward, c.tiles.rows, c.tiles.shares);
  if (rung == 3 && backward) c.backward(c.tiles.split_keys_backward, kSplitRowsBackward, 1);
  const double heads = static_cast<double>(problem.batch * problem.num_q_heads), entries = c.visible();
  return {c.bytes * heads, entries == 0 ? 0 : c.other / entries};
}

}  // namespace fovea::ladder
