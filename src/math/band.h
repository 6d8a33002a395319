#pragma once

#include "math/fn.h"

namespace fovea::math {

enum class TileState { kHidden, kPartial, kFull };

template <class Int>
struct IntervalOf {
  Int begin;
  Int end;
  FOVEA_FN constexpr bool empty() const { return end <= begin; }
  FOVEA_FN constexpr bool contains(Int x) const { return begin <= x && x < end; }
};
using Interval = IntervalOf<i64>;

/// What the caller says of the band, whatever the lengths.
struct BandRule {
  static constexpr i64 kUnbounded = i64{1} << 60;
  bool top_left = false;
  i64 left = kUnbounded, right = kUnbounded;

  /// From fovea::Rules, which this header does without.
  template <class Rules>
  FOVEA_FN static constexpr BandRule of(const Rules& rules) {
    using Causal = decltype(rules.causal);
    return {rules.causal == Causal::kTopLeft, rules.window_left.value_or(kUnbounded),
            rules.causal == Causal::kNone ? rules.window_right.value_or(kUnbounded) : 0};
  }
  FOVEA_FN constexpr bool bounded() const { return left < kUnbounded || right < kUnbounded; }
};

/// THE RULE OF THE MASK that needs no memory: causal corners, windows, lengths.  Query i of one sequence sees the keys
/// of one interval, and both ends of the interval never move left as i grows; everything else follows from that.  A
/// rule of this kind is changed in `BandRule` (`bounded` too: GPUs ask no band that has no bounds), `of`, `keys_of_row`
/// and `rows_of_key` and nowhere else; kernels only ask. Int has 64 bits on the host, 32 on GPUs: positions below 2^29.
template <class Int>
struct BandOf {
  using Interval = IntervalOf<Int>;
  static constexpr Int kUnbounded = sizeof(Int) == 8 ? static_cast<Int>(BandRule::kUnbounded) : Int{1} << 29;

  Int seqlen_q = 0;        // rows past it see nothing
  Int seqlen_kv = 0;       // keys past it are hidden
  Int offset = 0;          // the diagonal runs through key i + offset: 0 top left, seqlen_kv − seqlen_q bottom right
  Int left = kUnbounded;   // keys before the diagonal that stay visible
  Int right = kUnbounded;  // keys after it; causal is 0

  /// The band of one sequence.
  FOVEA_FN static constexpr BandOf of(const BandRule& rule, Int seqlen_q, Int seqlen_kv) {
    return {seqlen_q, seqlen_kv, rule.top_left ? 0 : seqlen_kv - seqlen_q,
            static_cast<Int>(smaller<i64>(rule.left, kUnbounded)),
            static_cast<Int>(smaller<i64>(rule.right, kUnbounded))};
  }

  FOVEA_FN constexpr Int clip_key(Int j) const { return smaller(larger(j, Int{0}), seqlen_kv); }
  FOVEA_FN constexpr Int clip_row(Int i) const { return smaller(larger(i, Int{0}), seqlen_q); }

  /// The keys that row i sees.
  FOVEA_FN constexpr Interval keys_of_row(Int i) const {
    if (i >= seqlen_q) return {0, 0};
    return {clip_key(i + offset - left), clip_key(i + offset + right + 1)};
  }

  /// The rows that see key j.
  FOVEA_FN constexpr Interval rows_of_key(Int j) const {
    if (j >= seqlen_kv) return {0, 0};
    return {clip_row(j - offset - right), clip_row(j - offset + left + 1)};
  }

  FOVEA_FN constexpr bool visible(Int i, i64 j) const { return keys_of_row(i).contains(j); }

  /// The smallest interval that holds every key seen by rows [begin, end), and likewise for keys.
  FOVEA_FN constexpr Interval keys_of_rows(Interval rows) const {
    rows.end = smaller(rows.end, seqlen_q);
    if (rows.empty()) return {0, 0};
    return {keys_of_row(rows.begin).begin, keys_of_row(rows.end - 1).end};
  }
  FOVEA_FN constexpr Interval rows_of_keys(Interval keys) const {
    keys.end = smaller(keys.end, seqlen_kv);
    if (keys.empty()) return {0, 0};
    return {rows_of_key(keys.begin).begin, rows_of_key(keys.end - 1).end};
  }

  /// The rows that see every one of these keys.
  FOVEA_FN constexpr Interval rows_that_see_all(Interval keys) const {
    if (keys.empty() || keys.end > seqlen_kv) return {0, 0};
    return {rows_of_key(keys.end - 1).begin, rows_of_key(keys.begin).end};
  }

  /// What a tile of these rows can ask without the band: which keys any of the rows sees, and which all of them do.
  struct Reach {
    Int any_begin, any_end, all_begin, all_end;

    /// Skip a tile, compute it with the rule applied entry by entry, or compute it as if there were no rule.
    FOVEA_FN constexpr TileState tile(Interval keys) const {
      if (any_end <= larger(keys.begin, any_begin) || keys.end <= any_begin) return TileState::kHidden;
      return all_begin <= keys.begin && keys.end <= all_end ? TileState::kFull : TileState::kPartial;
    }
  };
  FOVEA_FN constexpr Reach reach(Interval rows) const {
    const Interval any = keys_of_rows(rows);
    const Interval first = keys_of_row(rows.begin), last = keys_of_row(rows.end - 1);
    return {any.begin, any.end, last.begin, smaller(first.end, last.end)};
  }
  FOVEA_FN constexpr TileState tile(Interval rows, Interval keys) const { return reach(rows).tile(keys); }
};
using Band = BandOf<i64>;

}  // namespace fovea::math
