#pragma once

#include "cuda/kernels/sequence.cuh"
#include "math/philox.h"

// What happens to scores between the product and the softmax, option by option, and to weights behind it: one text for
// forward and backward.
namespace fovea::cuda {

/// Which query of which head a row of a block is.  Packed: the rows of a kv head's group are numbered query first, so
/// that grouped heads share the keys and values they read.
template <bool kPacked>
struct RowMap {
  int first;  // number of the block's row 0
  int rows;   // of the sequence, over all heads that share the numbering
  int first_head;
  int group;  // heads that share it: 1 where it is not packed

  FOVEA_DEVICE int query(int r) const { return kPacked ? (first + r) / group : first + r; }
  FOVEA_DEVICE int head(int r) const { return kPacked ? first_head + (first + r) % group : first_head; }
  FOVEA_DEVICE int left() const { return rows - first; }
  /// The queries of rows [begin, end) of the block.
  FOVEA_DEVICE Interval queries(int begin, int end) const {
    end = math::smaller(end, left());
    if (end <= begin) return {0, 0};
    return {query(begin), query(end - 1) + 1};
  }
};

/// Calls f(entry, row, column) for all entries of a warp's piece of a matrix, rows and columns counted from its corner.
template <int kM, int kN, class F>
FOVEA_DEVICE void for_each_entry(Accumulator (&s)[kM][kN], const F& f) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        f(s[i][j].x[e], 16 * i + lane_id() / 4 + e / 2 * 8, 8 * j + lane_id() % 4 * 2 + e % 2);
    }
  }
}

/// Nothing comes between the product and the softmax, which then applies the scale as well.
template <auto S>
inline constexpr bool kBareScores = !S.softcap && !S.alibi && !S.bias;

/// What the softmax multiplies finished scores by to have them in units of log2.
template <auto S>
FOVEA_DEVICE float score_unit(const CallParams& p) {
  return kBareScores<S> && p.scale > 0.0F ? p.scale * kLog2E : 1.0F;
}

/// Mask and bias under a piece of scores, two keys at a time, so that they can be on their way while the product is
/// made.
template <auto S, int kM, int kN>
struct EntryPairs {
  static constexpr bool kFp32 = S.bias_type == Type::kFloat32;
  bool there = false;  // where not, entries are read one by one
  u16 mask[S.mask ? kM : 1][2][S.mask ? kN : 1];
  u32 bias[S.bias ? kM : 1][2][S.bias ? kN : 1][kFp32 ? 2 : 1];

  FOVEA_DEVICE bool masked(int i, int j, int e) const { return (mask[i][e / 2][j] >> (8 * (e % 2)) & 0xff) == 0; }
  FOVEA_DEVICE float bias_of(int i, int j, int e) const {
    if constexpr (kFp32) return __uint_as_float(bias[i][e / 2][j][e % 2]);
    return widen<S.bias_type>(e % 2 == 0 ? bias[i][e / 2][j][0] : bias[i][e / 2][j][0] >> 16);
  }
};

/// All that scores depend on but their position.
template <auto S, bool kPacked>
struct ScoreRules {
  const CallParams& p;
  const Sequence& sequence;
  const RowMap<kPacked>& rows;

  /// softcap · tanh(x / softcap) − slope · distance + bias, in units of log2, for the entry of row r and key j.
  FOVEA_DEVICE float score(float qk, int r, int j, float bias, float* tanh_of_it) const {
    float s = qk * p.scale;
    if constexpr (S.softcap) {
      const float t = tanh(s / p.softcap);
      if (tanh_of_it != nullptr) *tanh_of_it = t;
      s = p.softcap * t;
    }
    if constexpr (S.alibi) s -= slope(r) * distance(r, j);
    if constexpr (S.bias) s += bias;
    return s * kLog2E;
  }
  FOVEA_DEVICE float bias_at(int r, int j) const {
    if constexpr (S.bias) {
      if (inside(r, j)) return read<S.bias_type>(sequence.entry(p.bias, rows.query(r), j, rows.head(r)));
    }
    return 0.0F;
  }
  FOVEA_DEVICE float slope(int r) const { return p.slopes.data[sequence.batch * p.slopes.batch + rows.head(r)]; }
  FOVEA_DEVICE float distance(int r, int j) const {
    return fabsf(static_cast<float>(rows.query(r) + static_cast<int>(sequence.band.offset) - j));
  }

  /// One entry as `finish` leaves it.
  FOVEA_DEVICE float finished(float qk, int r, int j, float* tanh_of_it) const {
    if constexpr (kBareScores<S>) return p.scale > 0.0F ? qk : qk * (p.scale * kLog2E);
    return score(qk, r, j, bias_at(r, j), tanh_of_it);
  }

  /// The entry exists, so that masks and biases may be asked for it.
  FOVEA_DEVICE bool inside(int r, int j) const { return r < rows.left() && j < sequence.kv_rows; }
  FOVEA_DEVICE bool masked(int r, int j) const {
    return inside(r, j) && *sequence.entry(p.mask, rows.query(r), j, rows.head(r)) == 0;
  }
  FOVEA_DEVICE bool visible(int r, int j) const {
    if (!inside(r, j) || !sequence.band.visible(rows.query(r), j)) return false;
    if constexpr (S.mask) {
      if (masked(r, j)) return false;
    }
    return bias_at(r, j) != -infinity();
  }

  /// Asks for mask and bias of a piece whose rows are queries.
  template <int kM, int kN>
  FOVEA_DEVICE void fetch(EntryPairs<S, kM, kN>& pairs, int row, int key) const {
    if constexpr (S.mask || S.bias) {
      pairs.there = !kPacked && p.entries_in_pairs && row + 16 * kM <= rows.left() && key + 8 * kN <= sequence.kv_rows;
      if (!pairs.there) return;
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int r = row + 16 * i + lane_id() / 4 + 8 * h, j = key + lane_id() % 4 * 2;
          if constexpr (S.mask) {
            const char* at = sequence.entry(p.mask, rows.query(r), j, rows.head(r));
#pragma unroll
            for (int n = 0; n < kN; ++n) pairs.mask[i][h][n] = *reinterpret_cast<const u16*>(at + 8 * n);
          }
          if constexpr (S.bias) {
            const char* at = sequence.entry(p.bias, rows.query(r), j, rows.head(r));
#pragma unroll
            for (int n = 0; n < kN; ++n) {
              const char* pair = at + 8 * n * kBytes<S.bias_type>;
              if constexpr (S.bias_type == Type::kFloat32) {
                const uint2 x = *reinterpret_cast<const uint2*>(pair);
                pairs.bias[i][h][n][0] = x.x, pairs.bias[i][h][n][1] = x.y;
              } else {
                pairs.bias[i][h][n][0] = *reinterpret_cast<const u32*>(pair);
              }
            }
          }
        }
      }
    }
  }

  /// A piece of Q Kᵀ, or of K Qᵀ where kTransposed, becomes what the softmax sees; hidden entries become −infinity.
  /// Row and key 0 of the piece are row `row` of the block and key `key`.  `use_mask` is false where the mask hides
  /// nothing of the tile.  `tanhs`, where the backward wants it, receives softcap's.
  template <bool kTransposed, int kM, int kN>
  FOVEA_DEVICE void finish(Accumulator (&s)[kM][kN], int row, int key, TileState state, bool use_mask,
                           Accumulator (*tanhs)[kN], const EntryPairs<S, kM, kN>& pairs) const {
    if constexpr (kBareScores<S>) {
      if (p.scale <= 0.0F) {  // the largest product is not the largest score
        for_each_entry(s, [&](float& x, int, int) { x *= p.scale * kLog2E; });
      }
    } else {
      score_all<kTransposed>(s, row, key, tanhs, pairs);
    }
    hide<kTransposed>(s, row, key, state, use_mask, pairs);
  }

  template <bool kTransposed, int kM, int kN>
  FOVEA_DEVICE void score_all(Accumulator (&s)[kM][kN], int row, int key, Accumulator (*tanhs)[kN],
                              const EntryPairs<S, kM, kN>& pairs = {}) const {
    if (S.bias && pairs.there) {
      score_with<kTransposed, true>(s, row, key, tanhs, pairs);
    } else {
      score_with<kTransposed, false>(s, row, key, tanhs, pairs);
    }
  }

  template <bool kTransposed, bool kPairs, int kM, int kN>
  FOVEA_DEVICE void score_with(Accumulator (&s)[kM][kN], int row, int key, Accumulator (*tanhs)[kN],
                               const EntryPairs<S, kM, kN>& pairs) const {
    int at = 0;
    for_each_entry(s, [&](float& x, int a, int b) {
      const int r = row + (kTransposed ? b : a), j = key + (kTransposed ? a : b);
      const int m = at / (4 * kN), n = at / 4 % kN, e = at % 4;
      float bias = 0.0F;
      if constexpr (kPairs && S.bias) {
        bias = pairs.bias_of(m, n, e);
      } else {
        bias = bias_at(r, j);
      }
      x = score(x, r, j, bias, tanhs == nullptr ? nullptr : &tanhs[m][n].x[e]);
      ++at;
    });
  }

  template <bool kTransposed, int kM, int kN>
  FOVEA_DEVICE void hide(Accumulator (&s)[kM][kN], int row, int key, TileState state, bool use_mask,
                         const EntryPairs<S, kM, kN>& pairs = {}) const {
    if constexpr (S.mask) {
      if (use_mask && pairs.there) {
        int at = 0;
        for_each_entry(s, [&](float& x, int, int) {
          if (pairs.masked(at / (4 * kN), at / 4 % kN, at % 4)) x = -infinity();
          ++at;
        });
      } else if (use_mask) {
        for_each_entry(s, [&](float& x, int a, int b) {
          if (masked(row + (kTransposed ? b : a), key + (kTransposed ? a : b))) x = -infinity();
        });
      }
    }
    if (state == TileState::kPartial) hide_outside_band<kTransposed>(s, row, key);
  }

  template <bool kTransposed, int kM, int kN>
  FOVEA_DEVICE void hide_outside_band(Accumulator (&s)[kM][kN], int row, int key) const {
    constexpr int kQueries = kTransposed ? kN : kM;
#pragma unroll
    for (int i = 0; i < kQueries; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // the two queries of this lane in a piece
        const int at = kTransposed ? 8 * i + lane_id() % 4 * 2 + h : 16 * i + lane_id() / 4 + 8 * h;
        Interval seen = sequence.band.keys_of_row(rows.query(row + at));
        if (row + at >= rows.left()) seen = {0, 0};
        seen = {seen.begin - key, seen.end - key};
#pragma unroll
        for (int j = 0; j < (kTransposed ? kM : kN); ++j) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int b = kTransposed ? 16 * j + lane_id() / 4 + 8 * e : 8 * j + lane_id() % 4 * 2 + e;
            float& x = kTransposed ? s[j][i].x[2 * e + h] : s[i][j].x[2 * h + e];
            x = seen.contains(b) ? x : -infinity();
          }
        }
      }
    }
  }

  // ---- dropout

  FOVEA_DEVICE math::DropoutStream stream(int head) const {
    return math::dropout_stream(p.seed, p.offset, static_cast<u32>(sequence.batch * p.q_heads + head));
  }

  /// Whether dropout keeps an entry.
  FOVEA_DEVICE bool kept(int r, int j) const {
    const int i = rows.query(r);
    return math::draws_of_patch(stream(rows.head(r)), math::patch_of(i), math::patch_of(j)).at(i, j) < p.keep_threshold;
  }

  /// Calls f(entry, kept) for all entries of a piece, which begins at multiples of 16.
  template <bool kTransposed, int kM, int kN, class F>
  FOVEA_DEVICE void drop(Accumulator (&s)[kM][kN], int row, int key, const math::DropoutStream& stream,
                         const F& f) const {
    if constexpr (kPacked) {
      for_each_entry(s, [&](float& x, int a, int b) { f(x, kept(row + a, key + b)); });
    } else {
      for_each_draw<kTransposed, kM, kN>(row, key, stream,
                                         [&](int i, int j, int e, bool kept) { f(s[i][j].x[e], kept); });
    }
  }

  /// Calls f(i, j, e, kept) for entry e of every accumulator [i][j] of a piece.
  template <bool kTransposed, int kM, int kN, class F>
  FOVEA_DEVICE void for_each_draw(int row, int key, const math::DropoutStream& stream, const F& f) const {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; j += 2) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {  // four entries from one draw: two rows by two columns, 8 apart
          const int a = 16 * i + lane / 4, b = 8 * j + lane % 4 * 2 + e;
          const math::Draws draws =
              math::draws_of_patch(stream, math::patch_of(rows.first + row + (kTransposed ? b : a)),
                                   math::patch_of(key + (kTransposed ? a : b)));
#pragma unroll
          for (int half = 0; half < 4; ++half) {
            const int low = half / 2, right = half % 2;  // of the row, of the column
            const u32 draw = draws.at(8 * (kTransposed ? right : low), 8 * (kTransposed ? low : right));
            f(i, j + right, 2 * low + e, draw < p.keep_threshold);
          }
        }
      }
    }
  }
};

}  // namespace fovea::cuda
