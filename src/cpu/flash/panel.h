#pragma once

#include "cpu/flash/product.h"

// A panel: as many rows as kPanelVectors vectors have lanes.  A row is one query of one head; the rows of a kv head's
// group are numbered query first, so that grouped heads share the keys and values they read.
namespace fovea::cpu::FOVEA_ISA {

inline constexpr int kPanelVectors = 3;
inline constexpr i64 kPanelRows = kPanelVectors * kWidth;
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

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// Row r is query r / group of head first_head + r % group.
struct RowMap {
  i64 group, first_head, rows;
};

struct alignas(64) Panel {
  float slope[kPanelRows];  // ALiBi, in units of log2
  std::uint32_t draw_key[kPanelRows], draw_row[kPanelRows],
      draw_column[kPanelRows];  // dropout stream; row patch folded in
  i64 query[kPanelRows], head[kPanelRows];
  Interval queries;  // of the real rows
  i64 rows;          // real rows; lanes past them see nothing and are never stored
};

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

  /// Q is multiplied by this as it is packed, so that S = K Qᵀ needs no more scaling: scores in units of log2, or the
  /// argument of softcap's tanh.
  [[nodiscard]] float fold() const { return call.softcap > 0 ? call.scale / call.softcap : call.scale * kLog2E; }

  /// The rule for one entry; for the rare places where a tile's bulk answer does not do.
  [[nodiscard]] bool visible(i64 i, i64 j, i64 head) const {
    if (!sequence.band.visible(i, j)) return false;
    if (call.mask.data != nullptr && *entry(call.mask, i, j, head) == 0) return false;
    return call.bias.data == nullptr || widen(entry(call.bias, i, j, head), call.bias_type) != -kInfinity;
  }
};

inline void set_rows(Panel& panel, const Context& context, const RowMap& map, i64 first_row) {
  const FlashCall& call = context.call;
  const i64 left = map.rows - first_row;
  panel.rows = math::smaller(math::larger(left, i64{0}), kPanelRows);
  i64 stream_head = -1;
  math::DropoutStream stream{};
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    const bool real = lane < panel.rows;
    const i64 i = real ? (first_row + lane) / map.group : kNoQuery;
    const i64 head = map.first_head + (real ? (first_row + lane) % map.group : 0);
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
  panel.queries = panel.rows == 0 ? Interval{0, 0} : Interval{panel.query[0], panel.query[panel.rows - 1] + 1};
}

/// Packs rows of q or dout as columns, [dim][lane], times `factor`; rows that are not real or past their length are 0.
/// With `straight` it also leaves them as rows, [lane][padded dim], unscaled, rows that are not finite as 0, and flags
/// those.
inline void pack_panel(float* columns, const Panel& panel, const Context& context, const RowView& view, i64 dim,
                       float factor, float* row_buffer, float* straight, i64 padded, bool* bad) {
  for (i64 lane = 0; lane < kPanelRows; ++lane) {
    float* row = straight == nullptr ? row_buffer : straight + lane * padded;
    bool finite = true;
    if (panel.query[lane] < context.sequence.band.seqlen_q) {
      finite = widen_row(row, context.q_row(view, panel.query[lane], panel.head[lane]), context.call.type, dim, padded);
    } else {
      for (i64 c = 0; c < padded; ++c) row[c] = 0.0F;
    }
    for (i64 c = 0; c < dim; ++c) columns[c * kPanelRows + lane] = row[c] * factor;
    if (bad != nullptr) bad[lane] = !finite;
    if (straight != nullptr && !finite) {
      for (i64 c = 0; c < padded; ++c) row[c] = 0.0F;
    }
  }
}

/// A block of keys or values as floats, [key][stride].
struct PackedRows {
  i64 dim = 0, stride = 0;
  float* data = nullptr;
  bool* bad = nullptr;  // rows that are not finite
  bool any_bad = false;

  PackedRows() = default;
  /// An odd number of cache lines a row: a column read down the rows meets every set of the cache.
  PackedRows(Arena& arena, i64 rows, i64 dim)
      : dim(dim),
        stride((((dim + 15) / 16) | 1) * 16),
        data(arena.take<float>(rows * stride)),
        bad(arena.take<bool>(rows)) {}

  [[nodiscard]] float* row(i64 r) const { return data + r * stride; }

  void pack(const Context& context, const RowView& view, Interval keys, i64 head) {
    any_bad = false;
    for (i64 j = keys.begin; j < keys.end; ++j) {
      const i64 at = j - keys.begin;
      bad[at] = !widen_row(row(at), context.kv_row(view, j, head), context.call.type, dim, dim);
      any_bad = any_bad || bad[at];
    }
  }

  /// Zeros in the place of rows that are not finite, so that a hidden entry's 0 annihilates them; visible ones are
  /// added afterwards, one by one.
  void clear_bad(i64 rows) const {
    for (i64 r = 0; any_bad && r < rows; ++r) {
      for (i64 c = 0; bad[r] && c < dim; ++c) row(r)[c] = 0.0F;
    }
  }
};

}  // namespace fovea::cpu::FOVEA_ISA
