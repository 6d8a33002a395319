#pragma once

#include "math/fn.h"

namespace fovea::math {

enum class TileState { kHidden, kPartial, kFull };

struct Interval {
  i64 begin;
  i64 end;
  FOVEA_FN constexpr bool empty() const { return end <= begin; }
  FOVEA_FN constexpr bool contains(i64 x) const { return begin <= x && x < end; }
};

/// What the caller says of the band, whatever the lengths.
struct BandRule {
  static constexpr i64 kUnbounded = i64{1} << 60;
  bool top_left = false;
  i64 left = kUnbounded, right = kUnbounded;

  /// From fovea::Rules, which this header does without.
  template <class Rules>
  static constexpr BandRule of(const Rules& rules) {
    using Causal = decltype(rules.causal);
    return {rules.causal == Causal::kTopLeft, rules.window_left.value_or(kUnbounded),
            rules.causal == Causal::kNone ? rules.window_right.value_or(kUnbounded) : 0};
  }
  FOVEA_FN constexpr bool bounded() const { return left < kUnbounded || right < kUnbounded; }
};

/// THE RULE OF THE MASK that needs no memory: causal corners, windows, lengths.  Query i of one sequence sees the keys
/// of one interval, and both ends of the interval never move left as i grows; everything else follows from that.  A
/// rule of this kind is changed in `BandRule`, `of`, `keys_of_row` and `rows_of_key` and nowhere else; kernels only ask.
struct Band {
  static constexpr i64 kUnbounded = BandRule::kUnbounded;

  i64 seqlen_q = 0;        // rows past it see nothing
  i64 seqlen_kv = 0;       // keys past it are hidden
  i64 offset = 0;          // the diagonal runs through key i + offset: 0 top left, seqlen_kv − seqlen_q bottom right
  i64 left = kUnbounded;   // keys before the diagonal that stay visible
  i64 right = kUnbounded;  // keys after it; causal is 0

  /// The band of one sequence.
  FOVEA_FN static constexpr Band of(const BandRule& rule, i64 seqlen_q, i64 seqlen_kv) {
    return {seqlen_q, seqlen_kv, rule.top_left ? 0 : seqlen_kv - seqlen_q, rule.left, rule.right};
  }

  FOVEA_FN constexpr i64 clip_key(i64 j) const { return smaller(larger(j, i64{0}), seqlen_kv); }
  FOVEA_FN constexpr i64 clip_row(i64 i) const { return smaller(larger(i, i64{0}), seqlen_q); }

  /// The keys that row i sees.
  FOVEA_FN constexpr Interval keys_of_row(i64 i) const {
    if (i >= seqlen_q) return {0, 0};
    return {clip_key(i + offset - left), clip_key(i + offset + right + 1)};
  }

  /// The rows that see key j.
  FOVEA_FN constexpr Interval rows_of_key(i64 j) const {
    if (j >= seqlen_kv) return {0, 0};
    return {clip_row(j - offset - right), clip_row(j - offset + left + 1)};
  }

  FOVEA_FN constexpr bool visible(i64 i, i64 j) const { return keys_of_row(i).contains(j); }

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

  /// Skip a tile, compute it with the rule applied entry by entry, or compute it as if there were no rule.
  FOVEA_FN constexpr TileState tile(Interval rows, Interval keys) const {
    const Interval seen = keys_of_rows(rows);
    if (seen.empty() || seen.end <= keys.begin || keys.end <= seen.begin) return TileState::kHidden;
    const Interval first = keys_of_row(rows.begin), last = keys_of_row(rows.end - 1);
    const bool full = last.begin <= keys.begin && keys.end <= first.end && keys.end <= last.end;
    return full ? TileState::kFull : TileState::kPartial;
  }
};

}  // namespace fovea::math
