#pragma once

#include "cpu/flash/panel.h"

// Few rows, as in decoding: their scores share a vector, and what takes time is reading keys and values.  So these are
// read once, where the caller keeps them and in the order in which they lie, and q and O are rows of vectors as well.
namespace fovea::cpu::FOVEA_ISA {

/// A row of elements as vectors.  The last one ends where the row does: it repeats elements of the one before it.
struct RowVectors {
  i64 dim, floats, last, repeated;  // floats: of all vectors; last: the element with which the last one begins

  explicit RowVectors(i64 dim)
      : dim(dim),
        floats(whole(dim, kWidth)),
        last(math::larger(dim - kWidth, i64{0})),
        repeated(floats - kWidth - last) {}

  /// Elements from which the vector at `x` is.
  [[nodiscard]] FOVEA_INLINE i64 begin(i64 x) const { return math::smaller(x, last); }
  /// Where element c is that counts.
  [[nodiscard]] FOVEA_INLINE i64 at(i64 c) const { return c < last ? c : c + repeated; }

  /// Of a row padded to whole vectors, times `factor`; what is repeated is 0, so that a sum over the row has it once.
  void split(float* vectors, const float* row, float factor) const {
    for (i64 x = 0; x < floats; x += kWidth) store(vectors + x, load(row + begin(x)) * factor);
    for (i64 x = 0; x < repeated; ++x) vectors[floats - kWidth + x] = 0.0F;
  }
  void join(float* row, const float* vectors) const {
    for (i64 x = 0; x < floats; x += kWidth) store(row + begin(x), load(vectors + x));
  }
};

/// bf16 is multiplied in pairs where it can be, and where rows are whole vectors of them.
FOVEA_INLINE bool in_pairs(Element type, i64 dim) {
  return kHasPairs && type == Element::kBFloat16 && dim % (2 * kWidth) == 0;
}

/// Two vectors of O that were summed in pairs, to the order of their columns.
FOVEA_INLINE void unpair_columns(float* o) {
  V low = load(o), high = load(o + kWidth);
  swap_halves<kWidth / 4>(low, high, AllLanes{}), swap_halves<kWidth / 2>(low, high, AllLanes{});
  store(o, low), store(o + kWidth, high);
}
/// Where column c is until then.
inline i64 place_in_pairs(i64 c) {
  alignas(64) float places[2 * kWidth];
  for (int x = 0; x < 2 * kWidth; ++x) places[x] = static_cast<float>(x);
  unpair_columns(places);
  return c / (2 * kWidth) * (2 * kWidth) + static_cast<i64>(places[c % (2 * kWidth)]);
}

/// Keys or values of some heads, and what few rows make of them.
struct FewRows {
  const char* data;
  i64 row, head;  // bytes from a key to the next, and from a head to the next
  Element type;
  bool pairs;    // are multiplied: q then is bf16, and rows of O are as `pair_rows` leaves them
  float factor;  // of S, where q has none
  RowVectors vectors;
  i64 ahead;  // bytes from what is read to what is fetched meanwhile
  i64 keys, heads;
  float* scores;  // S or P, [head][kJoinedKeys][kPanelRows]
  float* rows;    // q or O, [head][row][vector]

  [[nodiscard]] FOVEA_INLINE const char* at(i64 key, i64 h) const { return data + key * row + h * head; }
  [[nodiscard]] FOVEA_INLINE float* scores_of(i64 key, i64 h) const {
    return scores + (h * kJoinedKeys + key) * kPanelRows;
  }
};

/// Calls f(x, begin) for each vector of a row, and fetch(begin) for each line of memory that it takes, roughly.
template <Word kWord, Element kType, class Fetch, class F>
FOVEA_INLINE void for_each_of_row(const RowVectors& vectors, Fetch&& fetch, F&& f) {
  constexpr i64 kStep = kWidth * kPerWord<kWord>, kLine = math::larger(i64{64} / bytes(kType), kStep);
  i64 x = 0;
  for (; x + kLine <= vectors.last; x += kLine) {
    fetch(x);
    FOVEA_UNROLL for (i64 y = x; y < x + kLine; y += kStep) f(y, y);
  }
  fetch(x);
  if constexpr (kWord == Word::kPair) return f(x, x);  // the last line is one vector
  for (; x < vectors.last; x += kStep) f(x, x);
  fetch(vectors.last);
  f(vectors.floats - kWidth, vectors.last);
}

/// To L2, where there are places for more lines than in L1.
FOVEA_INLINE void fetch_line(const char* at) { __builtin_prefetch(at, 0, 2); }

template <Word kWord, Element kType>
FOVEA_INLINE V words_at(const char* from) {
  return kWord == Word::kPair ? load(reinterpret_cast<const float*>(from)) : widen_vector(from, kType);
}

/// S = K Qᵀ of kHeads heads from h on: as many lanes as there are for each row have its score.
template <int kRows, int kHeads, Word kWord, Element kType>
FOVEA_INLINE void score_few(const FewRows& my, i64 key, i64 h) {
  const char* from[kHeads];
  const float* q[kHeads];
  FOVEA_UNROLL for (int i = 0; i < kHeads; ++i) {
    from[i] = my.at(key, h + i);
    q[i] = my.rows + (h + i) * kRows * my.vectors.floats;
  }
  V sums[kHeads][kRows] = {};
  const i64 ahead = my.ahead, stride = my.vectors.floats;
  for_each_of_row<kWord, kType>(
      my.vectors,
      [&](i64 begin) __attribute__((always_inline)) {
        FOVEA_UNROLL for (int i = 0; i < kHeads; ++i) fetch_line(from[i] + begin * bytes(kType) + ahead);
      },
      [&](i64 x, i64 begin) {
        FOVEA_UNROLL for (int i = 0; i < kHeads; ++i) {
          const V k = words_at<kWord, kType>(from[i] + begin * bytes(kType));
          FOVEA_UNROLL for (int r = 0; r < kRows; ++r) sums[i][r] =
              multiply_add<kWord>(k, load(q[i] + r * stride + x / kPerWord<kWord>), sums[i][r]);
        }
      });
  FOVEA_UNROLL for (int i = 0; i < kHeads; ++i) {
    const V scores = sums_in_groups(sums[i]);
    store(my.scores_of(key, h + i), kWord == Word::kPair ? scores * my.factor : scores);
  }
}
template <int kRows, Word kWord, Element kType>
[[gnu::noinline]] void score_few(const FewRows& my) {
  constexpr int kHeads = math::larger(4 / kRows, 1);  // for sums enough that do not wait for each other
  for (i64 key = 0; key < my.keys; ++key) {
    i64 h = 0;
    for (; h + kHeads <= my.heads; h += kHeads) score_few<kRows, kHeads, kWord, kType>(my, key, h);
    for (; h < my.heads; ++h) score_few<kRows, 1, kWord, kType>(my, key, h);
  }
}

/// O += Pᵀ V of kKeys keys.
template <int kRows, int kKeys, Word kWord, Element kType>
FOVEA_INLINE void add_values_of_few(const FewRows& my, i64 key) {
  constexpr int kBlock = math::smaller(kRows, kAccumulators / 3);  // rows whose weights are in registers
  constexpr int kPer = kPerWord<kWord>, kDepth = (kKeys + kPer - 1) / kPer;
  const i64 ahead = my.ahead, stride = my.vectors.floats;
  for (i64 h = 0; h < my.heads; ++h) {
    const char* from[kKeys];
    FOVEA_UNROLL for (int k = 0; k < kKeys; ++k) from[k] = my.at(key + k, h);
    const float* weights_of[kDepth];  // of a key or a pair of them
    alignas(64) float pairs[kDepth][kWidth];
    FOVEA_UNROLL for (int d = 0; d < kDepth; ++d) {
      if constexpr (kWord == Word::kPair) {
        const V second = 2 * d + 1 < kKeys ? load(my.scores_of(key + 2 * d + 1, h)) : V{};
        store(pairs[d], side_by_side(round_to_pairs(load(my.scores_of(key + 2 * d, h)), second)));
        weights_of[d] = pairs[d];
      } else {
        weights_of[d] = my.scores_of(key + d, h);
      }
    }
    for (int first = 0; first < kRows; first += kBlock) {
      V weights[kDepth][kBlock];
      FOVEA_UNROLL for (int d = 0; d < kDepth; ++d) {
        FOVEA_UNROLL for (int r = 0; r < kBlock; ++r) weights[d][r] =
            splat(weights_of[d][(first + r) * (kWidth / kRows)]);
      }
      float* o = my.rows + (h * kRows + first) * stride;
      for_each_of_row<kWord, kType>(
          my.vectors,
          [&](i64 begin) __attribute__((always_inline)) {
            FOVEA_UNROLL for (int k = 0; k < kKeys; ++k) fetch_line(from[k] + begin * bytes(kType) + ahead);
          },
          [&](i64 x, i64 begin) {
            V values[kDepth][kPer];
            FOVEA_UNROLL for (int d = 0; d < kDepth; ++d) {
              const auto value = [&](int k) { return words_at<kWord, kType>(from[k] + begin * bytes(kType)); };
              if constexpr (kWord == Word::kFloat) values[d][0] = value(d);
              if constexpr (kWord == Word::kPair)
                pair_rows(values[d], value(2 * d), 2 * d + 1 < kKeys ? value(2 * d + 1) : V{});
            }
            FOVEA_UNROLL for (int r = 0; r < kBlock; ++r) {
              FOVEA_UNROLL for (int v = 0; v < kPer; ++v) {
                float* at = o + r * stride + x + v * kWidth;
                V sum = load(at);
                FOVEA_UNROLL for (int d = 0; d < kDepth; ++d) sum =
                    multiply_add<kWord>(values[d][v], weights[d][r], sum);
                store(at, sum);
              }
            }
          });
    }
  }
}
template <int kRows, Word kWord, Element kType>
[[gnu::noinline]] void add_values_of_few(const FewRows& my) {
  constexpr int kKeys = bytes(kType) == 2 ? 4 : 2;  // more would be read in too many places at once
  i64 key = 0;
  for (; key + kKeys <= my.keys; key += kKeys) add_values_of_few<kRows, kKeys, kWord, kType>(my, key);
  for (; key < my.keys; ++key) add_values_of_few<kRows, 1, kWord, kType>(my, key);
}

/// Calls f with the number of rows, up to a power of two, and what is multiplied and read as constants.
template <int kRows = 1, class F>
FOVEA_INLINE void with_rows(i64 rows, const FewRows& few, F&& f) {
  if constexpr (kRows < kWidth) {
    if (rows > kRows) return with_rows<2 * kRows>(rows, few, f);
  }
  if constexpr (kHasPairs) {
    if (few.pairs) return f.template operator()<kRows, Word::kPair, Element::kBFloat16>();
  }
  if (few.type == Element::kFloat32) f.template operator()<kRows, Word::kFloat, Element::kFloat32>();
  if (few.type == Element::kFloat16) f.template operator()<kRows, Word::kFloat, Element::kFloat16>();
  if (few.type == Element::kBFloat16) f.template operator()<kRows, Word::kFloat, Element::kBFloat16>();
}

}  // namespace fovea::cpu::FOVEA_ISA
