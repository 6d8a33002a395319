#pragma once

#include <cstring>

#include "cpu/flash/product.h"
#include "cpu/threads.h"

// A panel: as many rows as kPanelVectors vectors have lanes.  A row is one query of one head; the rows of a kv head's
// group are numbered query first, so that grouped heads share the keys and values they read.
namespace fovea::cpu::FOVEA_ISA {

inline constexpr int kPanelVectors = 3;
inline constexpr i64 kPanelRows = kPanelVectors * kWidth;
/// Keys of a tile are counted in these steps: the depth of a product over keys, and the keys that a draw spans.
template <Word kWord>
inline constexpr i64 kKeyStep = kWord == Word::kPair ? 32 : 16;
/// Keys between two products of pairs: AMX falls asleep after some 1500 cycles without work, and takes 1000 to wake up.
inline constexpr i64 kTileStrip = 32;
inline constexpr i64 kNoQuery = math::Band::kUnbounded;  // query of a lane that holds no row

/// Takes the parts of a piece of memory one after another; with a null base it only counts.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <class T>
  T* take(i64 count) {
    const std::size_t at = used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  [[nodiscard]] std::size_t used() const { return used_; }

  /// What a scratch takes.
  template <class Scratch, class Shape>
  static i64 bytes_of(const FlashCall& call, const Shape& shape) {
    Arena counted(nullptr);
    Scratch(counted, call, shape);
    return static_cast<i64>(counted.used());
  }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// Runs kStep(index, worker) of a pass for every task.
template <auto kStep, class Pass>
void run_steps(Pass& pass, i64 tasks, int workers) {
  const auto step = [](void* of, i64 index, int worker) { (static_cast<Pass*>(of)->*kStep)(index, worker); };
  run_tasks(tasks, workers, step, &pass);
}

/// Row r is query r / group of head first_head + r % group.  `parts` lanes next to each other hold a row: its scores in
/// each of them.
struct RowMap {
  i64 group, first_head, rows, parts = 1;
};

struct alignas(64) Panel {
  float slope[kPanelRows];                                                            // ALiBi, in units of log2
  std::uint32_t draw_key[kPanelRows], draw_row[kPanelRows], draw_column[kPanelRows];  // of dropout, rows folded in
  i64 query[kPanelRows], head[kPanelRows];
  Interval queries;  // of the real rows
  i64 lanes;         // that hold real rows; those past them see nothing and are never stored
  i64 parts;
};

inline constexpr i64 kRowsAhead = 16;  // from a row that is read or written to the one that is fetched meanwhile
/// Asks memory for a row of elements; it may be one past the last.  Inlined: GCC drops calls of what only fetches.
FOVEA_INLINE void fetch_row(const char* row, Element type, i64 dim) {
  for (i64 b = 0; b < dim * bytes(type); b += 64) __builtin_prefetch(row + b);
}

/// One sequence of one call: what score and mask rules need to know.
struct Context {
  const FlashCall& call;
  const Sequence& sequence;
  i64 batch;

  [[nodiscard]] const char* at(const RowView& view, i64 begin, i64 row, i64 head) const {
    return view.data + batch * view.batch + (begin + row) * view.row + head * view.head;
  }
  [[nodiscard]] const char* q_row(const RowView& view, i64 i, i64 head) const {
    return at(view, sequence.q_begin, i, head);
  }
  [[nodiscard]] const char* kv_row(const RowView& view, i64 j, i64 head) const {
    return at(view, sequence.kv_begin, j, head);
  }
  [[nodiscard]] float* statistic(const StatView& view, i64 i, i64 head) const {
    return view.data + batch * view.batch + head * view.head + (sequence.q_begin + i) * view.row;
  }
  [[nodiscard]] const char* entry(const EntryView& view, i64 i, i64 j, i64 head) const {
    return view.data + batch * view.batch + head * view.head + i * view.query + j * view.key;
  }

  /// Writes one of a view's rows, and fetches a later one: a write waits for its lines of memory as a read does.
  void write_row(const RowView& view, const char* row, const float* from, i64 dim) const {
    fetch_row(row + kRowsAhead * view.row, call.type, dim);
    narrow_row(const_cast<char*>(row), from, call.type, dim);
  }

  /// What makes S = K Qᵀ scores in units of log2, where no softcap comes first.  Floats of Q are multiplied by it as
  /// they are packed; pairs must stay what they are, so there S is.
  [[nodiscard]] float fold() const { return call.softcap > 0 ? 1.0F : call.scale * kLog2E; }
  /// What makes S the argument of softcap's tanh: finite, so that products of 0 stay 0.
  [[nodiscard]] float tanh_factor() const {
    constexpr float kMost = 3.40282347e38F;
    return math::larger(math::smaller(call.scale / call.softcap, kMost), -kMost);
  }

  /// The rule for one entry; for the rare places where a tile's bulk answer does not do.
  [[nodiscard]] bool visible(i64 i, i64 j, i64 head) const {
    if (!sequence.band.visible(i, j)) return false;
    if (call.mask.data != nullptr && *entry(call.mask, i, j, head) == 0) return false;
    return call.bias.data == nullptr || widen(entry(call.bias, i, j, head), call.bias_type) >= kLowestBias;
  }
};

inline void set_rows(Panel& panel, const Context& context, const RowMap& map, i64 first_row) {
  const FlashCall& call = context.call;
  const i64 left = (map.rows - first_row) * map.parts;
  panel.lanes = math::smaller(math::larger(left, i64{0}), kPanelRows);
  panel.parts = map.parts;
  i64 stream_head = -1, row = first_row, part = 0;
  math::DropoutStream stream{};
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    const bool real = lane < panel.lanes;
    if (real && part == map.parts) ++row, part = 0;
    ++part;
    const i64 query = map.group == 1 || !real ? row : row / map.group;  // a division takes as long as packing the row
    const i64 i = real ? query : kNoQuery;
    const i64 head = map.first_head + (real ? row - query * map.group : 0);
    panel.query[lane] = i;
    panel.head[lane] = head;
    panel.slope[lane] = !call.alibi ? 0.0F : kLog2E * call.slopes.data[context.batch * call.slopes.batch + head];
    if (call.keep_threshold < 65536) {
      if (head != stream_head) {
        stream = math::dropout_stream(call.seed, call.offset,
                                      static_cast<std::uint32_t>(context.batch * call.q_heads + head));
        stream_head = head;
      }
      panel.draw_key[lane] = stream.key;
      panel.draw_row[lane] = stream.a ^ math::patch_of(i);
      panel.draw_column[lane] = stream.b;
    }
  }
  panel.queries = panel.lanes == 0 ? Interval{0, 0} : Interval{panel.query[0], panel.query[panel.lanes - 1] + 1};
}

/// Calls f with the number of a panel's vectors that hold real rows, at least one.
template <int kVectors = 1, class F>
FOVEA_INLINE auto with_vectors(const Panel& panel, F&& f) {
  if constexpr (kVectors < kPanelVectors) {
    if (panel.lanes > kVectors * kWidth) return with_vectors<kVectors + 1>(panel, f);
  }
  return f.template operator()<kVectors>();
}

/// C is as wide as a panel; vectors that hold no real row are not made.
template <Word kWord, ALayout kLayout, Init kInit>
inline void product_of_panel(const Panel& panel, const ProductArgs& args, i64 rows) {
  with_vectors(panel, [&]<int kVectors>() { product<kWord, kLayout, kInit, kVectors>(args, rows); });
}

/// Words of a row in memory: whole vectors, so that rows can be transposed.
template <Word kWord>
FOVEA_INLINE i64 row_words(i64 dim) {
  return whole(words_of<kWord>(dim), kWidth);
}

/// Packs a panel's rows of q or dout twice: as they lie, [lane][row_words], and as columns, [word][lane], times
/// `factor` if they are floats.  Rows that are not real or past their length are 0.
template <Word kWord>
inline void pack_panel(float* columns, float* rows, bool* bad, const Panel& panel, const Context& context,
                       const RowView& view, i64 dim, float factor) {
  const i64 words = row_words<kWord>(dim);
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    float* row = rows + lane * words;
    bad[lane] = false;
    if (panel.query[lane] < context.sequence.band.seqlen_q) {
      const char* from = context.q_row(view, panel.query[lane], panel.head[lane]);
      fetch_row(from + kRowsAhead * view.row, context.call.type, dim);
      bad[lane] = !pack_row<kWord>(row, from, context.call.type, dim, words);
    } else {
      for (i64 w = 0; w < words; ++w) row[w] = 0.0F;
    }
  }
  transpose_words<kWord>(columns, kPanelRows, rows, words, kPanelRows, words_of<kWord>(dim), factor);
}

/// Rows of words.
struct Rows {
  float* data = nullptr;
  i64 stride = 0;
};

/// A block of keys or values as words, [key][stride], up to a whole number of words' depth.
template <Word kWord>
struct PackedRows : Rows {
  i64 dim = 0, words = 0, count = 0;  // count: of the keys that are packed
  bool* bad = nullptr;                // rows that are not finite
  bool any_bad = false;

  PackedRows() = default;
  /// An odd number of cache lines a row: a column read down the rows meets every set of the cache.
  PackedRows(Arena& arena, i64 rows, i64 dim) : dim(dim), words(words_of<kWord>(dim)) {
    stride = (((words + 15) / 16) | 1) * 16;
    data = arena.take<float>(rows * stride);
    bad = arena.take<bool>(rows);
  }

  [[nodiscard]] float* row(i64 r) const { return data + r * stride; }

  void pack(const Context& context, const RowView& view, Interval keys, i64 head) {
    any_bad = false;
    for (i64 j = keys.begin; j < keys.end; ++j) {
      const i64 at = j - keys.begin;
      fetch_row(context.kv_row(view, j + kRowsAhead, head), context.call.type, dim);
      bad[at] = !pack_row<kWord>(row(at), context.kv_row(view, j, head), context.call.type, dim, row_words<kWord>(dim));
      any_bad = any_bad || bad[at];
    }
    count = keys.end - keys.begin;
    for (i64 r = count; kWord == Word::kPair && r < whole(count, kKeyStep<kWord>); ++r) clear(r);
  }

  /// The same rows as the caller keeps them.
  void copy(const Context& context, const RowView& view, Interval keys, i64 head) {
    const i64 size = dim * bytes(context.call.type);
    for (i64 r = 0; r < count; ++r)
      std::memcpy(row(r), context.kv_row(view, keys.begin + r, head), static_cast<std::size_t>(size));
  }

  /// Zeros in the place of rows that are not finite, so that a hidden entry's 0 annihilates them; visible ones are
  /// added afterwards, one by one.
  void clear_bad(i64 rows) const {
    for (i64 r = 0; any_bad && r < rows; ++r) {
      if (bad[r]) clear(r);
    }
  }

 private:
  void clear(i64 r) const {
    for (i64 w = 0; w < words; ++w) row(r)[w] = 0.0F;
  }
};

/// Packed rows as the A of a product that sums over them: C[dim] += Σ A(dim, row) B[row].  Floats are read down the
/// rows where they lie; pairs of rows have to be put side by side.
template <Word kWord>
struct PackedColumns : Rows {
  static constexpr ALayout kLayout = kWord == Word::kPair ? ALayout::kRowMajor : ALayout::kColumnMajor;

  PackedColumns() = default;
  PackedColumns(Arena& arena, i64 rows, i64 dim) {
    if constexpr (kWord == Word::kFloat) return;
    stride = ((whole(rows, kKeyStep<kWord>) / 32) | 1) * 16;
    data = arena.take<float>(whole(dim, 16) * stride);
  }

  /// What follows sees the first `count` of these rows.
  void take(const PackedRows<kWord>& rows, i64 count) {
    if constexpr (kWord == Word::kFloat) {
      static_cast<Rows&>(*this) = static_cast<const Rows&>(rows);
    } else {
      for (i64 r = 0; r < count; r += 2 * kWidth) {
        for (i64 c = 0; c < rows.dim; c += kWidth) {
          V x[kWidth];
          FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) x[i] =
              pair_of_rows(rows.row(r + 2 * i), rows.row(r + 2 * i + 1), c);
          transpose(x);
          FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) store(data + (c + i) * stride + r / 2, x[i]);
        }
      }
    }
  }

  /// A from row r on.
  [[nodiscard]] const float* at(i64 r) const { return data + (kWord == Word::kPair ? r / 2 : r * stride); }
};

}  // namespace fovea::cpu::FOVEA_ISA
