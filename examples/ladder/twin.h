#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/threads.h"
#include "params.h"

// What the twins have in common: where the rows of a head lie, who sees whom, one product, and threads.
namespace fovea::ladder {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
inline constexpr int kTile = 64;  // queries and keys of a tile

/// One (batch, head) of a call.
struct TwinHead {
  const Params& p;
  int dim;
  i64 index;

  [[nodiscard]] float* row(const RowView& view, i64 i) const {
    return reinterpret_cast<float*>(view.data + index / p.heads * view.batch + index % p.heads * view.head +
                                    i * view.row);
  }
  /// In elements.
  [[nodiscard]] static i64 stride(const RowView& view) { return view.row / static_cast<i64>(sizeof(float)); }
  [[nodiscard]] float& statistic(const StatView& view, i64 i) const {
    return view.data[index / p.heads * view.batch + index % p.heads * view.head + i * view.row];
  }
  [[nodiscard]] i64 row_number(i64 i) const { return index * p.seqlen_q + i; }
  [[nodiscard]] float* of_row(float* all, i64 i) const { return all + row_number(i) * dim; }

  [[nodiscard]] bool visible(i64 i, i64 j) const { return j <= i + p.diagonal && j < p.seqlen_kv; }
  /// Keys that some of the rows before `end` see; the first row that sees a key.
  [[nodiscard]] i64 visible_keys(i64 end) const {
    return std::clamp<i64>(std::min<i64>(end, p.seqlen_q) + p.diagonal, 0, p.seqlen_kv);
  }
  [[nodiscard]] i64 first_row(i64 key) const { return std::max<i64>(key - p.diagonal, 0); }
};

inline i64 tiles_of(i64 size, i64 tile) { return (size + tile - 1) / tile; }

/// C += A B: rows × depth by depth × columns; an element of A at data[r · row + k · step].  Four rows of B at a time,
/// so that C is read and written a quarter as often.
struct Factor {
  const float* data;
  i64 row, step;
};
inline void add_product(float* c, i64 c_row, const Factor& a, const float* b, i64 b_row, i64 rows, i64 depth,
                        i64 columns) {
  for (i64 r = 0; r < rows; ++r) {
    float* to = c + r * c_row;
    const auto factor = [&](i64 k) { return a.data[r * a.row + k * a.step]; };
    i64 k = 0;
    for (; k + 4 <= depth; k += 4) {
      const float *from = b + k * b_row, x[4] = {factor(k), factor(k + 1), factor(k + 2), factor(k + 3)};
      for (i64 n = 0; n < columns; ++n)
        to[n] += x[0] * from[n] + x[1] * from[n + b_row] + x[2] * from[n + 2 * b_row] + x[3] * from[n + 3 * b_row];
    }
    for (; k < depth; ++k) {
      for (i64 n = 0; n < columns; ++n) to[n] += factor(k) * b[k * b_row + n];
    }
  }
}

/// A tile's rows side by side, and as columns: what a product takes.
struct Rows {
  std::vector<float> rows, columns;  // [count][dim], [dim][kTile]
  i64 count = 0;
  int dim = 0;

  void load(const TwinHead& head, const RowView& view, i64 first, i64 end) {
    dim = head.dim;
    count = std::min<i64>(kTile, end - first);
    rows.resize(static_cast<std::size_t>(kTile) * dim);
    columns.assign(static_cast<std::size_t>(kTile) * dim, 0.0F);
    for (i64 r = 0; r < count; ++r) {
      const float* from = head.row(view, first + r);
      std::copy_n(from, dim, &rows[r * dim]);
      for (int c = 0; c < dim; ++c) columns[c * kTile + r] = from[c];
    }
  }
  [[nodiscard]] Factor factor() const { return {rows.data(), dim, 1}; }
};

/// kTile × kTile entries.
struct Entries {
  std::vector<float> x = std::vector<float>(static_cast<std::size_t>(kTile) * kTile);
  [[nodiscard]] float* row(i64 r) { return &x[r * kTile]; }
  [[nodiscard]] Factor factor() const { return {x.data(), kTile, 1}; }
  [[nodiscard]] Factor transposed() const { return {x.data(), 1, kTile}; }

  /// = A Bᵀ.
  void multiply(const Rows& a, const Rows& b) {
    std::fill(x.begin(), x.end(), 0.0F);
    add_product(x.data(), kTile, a.factor(), b.columns.data(), kTile, a.count, a.dim, kTile);
  }
};

/// Runs f(task) for all tasks, on all threads.
template <class F>
void for_each_task(i64 tasks, F f) {
  cpu::run_tasks(
      tasks, cpu::worker_count(0), [](void* context, std::int64_t task, int) { (*static_cast<F*>(context))(task); },
      &f);
}

}  // namespace fovea::ladder
