#pragma once

#include "cuda/kernels/mask_tiles.cuh"
#include "math/philox.h"

// What happens to scores between the product and the softmax, option by option, and to weights behind it.
namespace fovea::cuda {

/// Whether the rows of heads of a group are numbered together, query first, so that these share the keys and values
/// they read.  As if heads were a power of 2, no divisions are needed.
enum class Packing { kNone, kHeads, kPowerOf2 };

/// Heads that are numbered together, 1 where it is not packed.
template <Packing kPacking>
struct Group {
  int heads;

  FOVEA_DEVICE int query_of(int row) const { return row / heads; }
};
template <>
struct Group<Packing::kPowerOf2> {
  int heads, bits;  // heads up to 2^bits have rows that are not there

  FOVEA_DEVICE int query_of(int row) const { return row >> bits; }
  FOVEA_DEVICE int head_of(int row) const { return row & ((1 << bits) - 1); }
};

/// Which query of which head a row of a block is.
template <Packing kPacking>
struct RowMap {
  int first;  // number of the block's row 0
  int rows;   // of the sequence, over all heads that share the numbering
  int first_head;
  Group<kPacking> group;  // that shares it

  FOVEA_DEVICE int query(int r) const { return kPacking == Packing::kNone ? first + r : group.query_of(first + r); }
  FOVEA_DEVICE int head(int r) const {
    if constexpr (kPacking == Packing::kPowerOf2) return first_head + group.head_of(first + r);
    return kPacking == Packing::kNone ? first_head : first_head + (first + r) % group.heads;
  }
  FOVEA_DEVICE int left() const { return rows - first; }
  FOVEA_DEVICE bool has(int r) const {
    if constexpr (kPacking == Packing::kPowerOf2) return r < left() && group.head_of(first + r) < group.heads;
    return r < left();
  }
  /// The queries of rows [begin, end) of the block.
  FOVEA_DEVICE Interval queries(int begin, int end) const {
    end = math::smaller(end, left());
    if (end <= begin) return {0, 0};
    return {query(begin), query(end - 1) + 1};
  }
};

/// Calls f(i, j, e) for entry e of every accumulator [i][j] of a warp's piece of a matrix.
template <int kM, int kN, class F>
FOVEA_DEVICE void for_each_entry(const F& f) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i, j, e);
    }
  }
}

/// Nothing comes between the product and the softmax, which then applies the scale as well.
template <auto S>
inline constexpr bool kBareScores = !S.softcap && !S.alibi && !S.bias;
/// Whether a score that has been through `hide` is of a hidden entry: −infinity, or what a bias that hides has left.
template <auto S>
FOVEA_DEVICE bool is_hidden_score(float s) {
  return S.bias ? s < kLowestBias : s == -infinity();
}

/// What products, or with a softcap their tanh, are multiplied by to be scores.
template <auto S>
FOVEA_DEVICE float score_factor(const CallParams& p) {
  return S.softcap ? p.softcap : p.scale;
}
/// What finished scores are multiplied by to be in units of log2: of any sign, and as the softmax needs it, which looks
/// for the largest score.
template <auto S>
FOVEA_DEVICE float any_score_unit(const CallParams& p) {
  return (S.alibi || S.bias ? 1.0F : score_factor<S>(p)) * kLog2E;
}
template <auto S>
FOVEA_DEVICE float score_unit(const CallParams& p) {
  if constexpr (kBareScores<S>) {
    return (p.scale > 0.0F ? p.scale : 1.0F) * kLog2E;
  } else {
    return any_score_unit<S>(p);
  }
}

/// kBytes from a multiple of kBytes, at most of 16.
template <int kBytes>
FOVEA_DEVICE void load_run(u32* words, const char* from) {
  static_assert(kBytes % 4 == 0);
  if constexpr (kBytes == 4) words[0] = *reinterpret_cast<const u32*>(from);
  if constexpr (kBytes == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
  }
#pragma unroll
  for (int at = 0; at + 16 <= kBytes; at += 16) {
    const uint4 x = *reinterpret_cast<const uint4*>(from + at);
    words[at / 4] = x.x, words[at / 4 + 1] = x.y, words[at / 4 + 2] = x.z, words[at / 4 + 3] = x.w;
  }
}

/// Of row h of a lane's two, entry y becomes −infinity where bit y is not set.  Row by row, so that bits become
/// conditions seven at a time.
template <int kN>
FOVEA_DEVICE void keep_bits(Accumulator (&s)[kN], int h, u32 bits) {
#pragma unroll
  for (int y = 0; y < 2 * kN; ++y) {
    float& x = s[y / 2].x[2 * h + y % 2];
    x = (bits >> y & 1) != 0 ? x : -infinity();
  }
}

/// Mask and bias under a lane's entries, so that they can be on their way while the product is made.  Of each row: the
/// mask's words, shifted so that a lane finds its bits at the same places as all others; the bias of the lane's keys in
/// the order of its entries.
template <auto S, int kM, int kN>
struct Entries {
  static constexpr bool kFp32 = S.bias_type == Type::kFloat32;
  static constexpr int kWords = (kN + 3) / 4;
  u32 mask[S.mask ? kM : 1][2][S.mask ? kWords : 1];
  u32 bias[S.bias ? kM : 1][2][!S.bias ? 1 : kFp32 ? 2 * kN : kN];

  template <class Order>
  FOVEA_DEVICE bool sees(int i, int j, int e) const {
    constexpr u32 kBit = 1;
    const u32 at = Order::of_entry(j, e % 2);
    return (mask[i][e / 2][at / 32] & kBit << at % 32) != 0;
  }
  /// Of row h of piece i only keys [begin, end), counted from the lane's first one; `all`: whatever the mask.
  FOVEA_DEVICE void narrow(int i, int h, int begin, int end, bool all) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const u32 band = bits_between(begin - 32 * w, end - 32 * w);
      mask[i][h][w] = all ? band : mask[i][h][w] & band;
    }
  }
  FOVEA_DEVICE float bias_of(int i, int j, int e) const {
    const int x = 2 * j + e % 2;
    if constexpr (kFp32) {
      return __uint_as_float(bias[i][e / 2][x]);
    } else {
      return widen_half<S.bias_type>(bias[i][e / 2][x / 2], x % 2);
    }
  }
  /// s · scale + bias.
  FOVEA_DEVICE void add_bias(Accumulator (&s)[kM][kN], float scale) const {
    for_each_entry<kM, kN>([&](int i, int j, int e) { s[i][j].x[e] = s[i][j].x[e] * scale + bias_of(i, j, e); });
  }
};

/// Of one head for all lanes.
FOVEA_DEVICE math::DropoutStream uniform(const math::DropoutStream& stream) {
  return {uniform(stream.key), uniform(stream.a), uniform(stream.b)};
}

/// All that scores depend on but their position.  kOneSlope: whoever asks knows the slope, one for all rows.
template <auto S, Packing kPacking, class Order, bool kOneSlope = false>
struct ScoreRules {
  const CallParams& p;
  const Sequence& sequence;
  const RowMap<kPacking>& rows;
  float one_slope = 0.0F;

  FOVEA_DEVICE float bias_at(int r, int j) const {
    if constexpr (S.bias) {
      if (inside(r, j)) return read<S.bias_type>(sequence.entry(p.bias, rows.query(r), j, rows.head(r)));
    }
    return 0.0F;
  }
  FOVEA_DEVICE float slope(int r) const { return kOneSlope ? one_slope : slope_of(p, sequence, rows.head(r)); }
  FOVEA_DEVICE static float slope_of(const CallParams& p, const Sequence& sequence, int head) {
    return p.slopes.data[sequence.batch * p.slopes.batch + head];
  }
  FOVEA_DEVICE float distance(int r, int j) const {
    return fabsf(static_cast<float>(rows.query(r) + static_cast<int>(sequence.band.offset) - j));
  }

  /// By how much a slope may raise a row's scores from a tile of keys to `all`, which the tile is part of.
  FOVEA_DEVICE float rise(int r, Interval tile, Interval all) const {
    const i64 i = rows.query(r) + sequence.band.offset;
    const auto near = [i](Interval keys) {
      return math::larger(math::larger(keys.begin - i, i - keys.end + 1), i64{0});
    };
    const auto far = [i](Interval keys) { return math::larger(i - keys.begin, keys.end - 1 - i); };
    const float steep = slope(r);
    return steep * static_cast<float>(steep > 0.0F ? near(tile) - near(all) : far(tile) - far(all));
  }

  /// One entry as `finish` leaves it: tanh(x / softcap) · softcap − slope · distance + bias, where the factor is left
  /// to the softmax if nothing is added.
  FOVEA_DEVICE float finished(float qk, int r, int j) const {
    if constexpr (kBareScores<S>) return p.scale > 0.0F ? qk : qk * p.scale;
    float s = S.softcap ? tanh(qk * p.scale * p.per_softcap) : qk;
    if constexpr (S.alibi || S.bias) s *= score_factor<S>(p);
    if constexpr (S.alibi) s -= slope(r) * distance(r, j);
    if constexpr (S.bias) s += bias_at(r, j);
    return s;
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
    return !(bias_at(r, j) < kLowestBias);
  }

  /// Row and key of an entry of a piece, counted from its corner.
  FOVEA_DEVICE static int row_of(int i, int e) { return 16 * i + lane_id() / 4 + e / 2 * 8; }
  FOVEA_DEVICE static int key_of(int j, int e) {
    return static_cast<int>(Order::of_lane(threadIdx.x % 4) + Order::of_entry(j, e % 2));
  }

  /// Asks for mask and bias of a piece.  Past the last row or key the last one is read: such entries are hidden anyway.
  template <bool kMasked = S.mask, int kM, int kN>
  FOVEA_DEVICE void fetch(Entries<S, kM, kN>& entries, int row, int key) const {
    const int first = row + fresh(lane_id()) / 4;
    const auto row_at = [&](int x) { return math::smaller(first + 8 * x, rows.left() - 1); };
    if constexpr (kMasked) {
#pragma unroll
      for (int x = 0; x < 2 * kM; ++x) fetch_words<kN>(entries.mask[x / 2][x % 2], row_at(x), key);
    }
    if constexpr (S.bias) {
      if (kPacking == Packing::kNone && p.bias_in_runs && row + 16 * kM <= rows.left() &&
          key + 8 * kN <= sequence.kv_rows) {
        const int i = rows.first + row + row_of(0, 0), j = key + key_of(0, 0);
        fetch_runs<kBytes<S.bias_type>>(entries.bias, sequence.entry(p.bias, i, j, rows.first_head), p.bias.query);
      } else {
#pragma unroll
        for (int x = 0; x < 2 * kM; ++x) fetch_one_by_one(entries.bias[x / 2][x % 2], row_at(x), key);
      }
    }
  }
  template <int kN, int kWords>
  FOVEA_DEVICE void fetch_words(u32 (&words)[kWords], int r, int key) const {
    const WordView& view = p.mask_words;
    const u32 mine = Order::of_lane(threadIdx.x % 4);
    const u32* const from =
        view.data + sequence.batch * view.batch + rows.head(r) * view.head + rows.query(r) * view.row;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = from[i64{math::smaller(key / 32 + static_cast<int>(mine / 32) + w, view.count - 1)} * view.rows];
    }
    u32 shift = mine % 32;
    if constexpr (kN % 4 != 0) {  // pieces may begin in the middle of a word
      static_assert(kWords <= 2);
      shift += static_cast<u32>(key) % 32;
      if constexpr (kWords == 2) words[0] = __funnelshift_rc(words[0], words[1], shift);
    }
#pragma unroll
    for (int w = kWords == 2 && kN % 4 != 0 ? 1 : 0; w < kWords; ++w) words[w] >>= shift;
  }
  /// Elements of kSize bytes; `from`: the lane's first; `stride`: bytes from row to row.
  template <int kSize, int kM, int kWords>
  FOVEA_DEVICE static void fetch_runs(u32 (&words)[kM][2][kWords], const char* from, i64 stride) {
    constexpr int kRun = Order::kRun;
#pragma unroll
    for (int row = 0; row < 2 * kM; ++row) {
      const char* const mine = from + 8 * row * stride;
#pragma unroll
      for (int x = 0; x < kWords * 4 / kSize; x += kRun) {
        const char* const run = mine + Order::of_entry(x / 2, 0) * kSize;
        u32* const to = words[row / 2][row % 2] + x * kSize / 4;
        load_run<kRun * kSize>(to, run);
      }
    }
  }
  template <int kWords>
  FOVEA_DEVICE void fetch_one_by_one(u32 (&words)[kWords], int r, int key) const {
    constexpr int kSize = kBytes<S.bias_type>;
#pragma unroll
    for (int x = 0; x < kWords * 4 / kSize; ++x) {
      const int j = math::smaller(key + key_of(x / 2, x % 2), sequence.kv_rows - 1);
      const char* from = sequence.entry(p.bias, rows.query(r), j, rows.head(r));
      if constexpr (kSize == 4) {
        words[x] = *reinterpret_cast<const u32*>(from);
      } else {
        const u32 one = *reinterpret_cast<const u16*>(from);
        words[x / 2] = x % 2 == 0 ? one : words[x / 2] | one << 16;
      }
    }
  }

  /// A piece of Q Kᵀ becomes what the softmax sees; hidden entries become −infinity.  Row and key 0 of the piece are
  /// row `row` of the block and key `key`.
  template <int kM, int kN, class Found>
  FOVEA_DEVICE void finish(Accumulator (&s)[kM][kN], int row, int key, const Sight& sight, const Found& entries) const {
    score(s, row, key, entries);
    hide(s, row, key, sight, entries);
  }
  template <int kM, int kN, class Found>
  FOVEA_DEVICE void score(Accumulator (&s)[kM][kN], int row, int key, const Found& entries) const {
    if constexpr (kBareScores<S>) {
      if (p.scale <= 0.0F) {  // the largest product is not the largest score
        for_each_entry<kM, kN>([&](int i, int j, int e) { s[i][j].x[e] *= p.scale; });
      }
    } else {
      score_all(s, row, key, static_cast<Accumulator(*)[kN]>(nullptr), entries);
    }
  }

  /// Softcap, ALiBi and bias.  `tanhs`, where the backward wants it, receives softcap's.
  template <int kM, int kN, class Found>
  FOVEA_DEVICE void score_all(Accumulator (&s)[kM][kN], int row, int key, Accumulator (*tanhs)[kN],
                              const Found& entries) const {
    if constexpr (S.softcap) {
      cap(s);
      if (tanhs != nullptr) for_each_entry<kM, kN>([&](int i, int j, int e) { tanhs[i][j].x[e] = s[i][j].x[e]; });
    }
    if constexpr (S.alibi) add_slopes(s, score_factor<S>(p), row, key);
    if constexpr (S.bias) entries.add_bias(s, S.alibi ? 1.0F : score_factor<S>(p));
  }

  /// Products become tanh(s · scale / softcap), by a polynomial where all of a warp's are small enough.
  template <int kM, int kN>
  FOVEA_DEVICE void cap(Accumulator (&s)[kM][kN]) const {
    float most = 0.0F;
    for_each_entry<kM, kN>([&](int i, int j, int e) { most = fmaxf(most, fabsf(s[i][j].x[e])); });
    const float to_x = p.scale * p.per_softcap;
    if (__all_sync(kAllLanes, most < p.small_score)) {
      const auto& a = p.small_terms;
      for_each_entry<kM, kN>([&](int i, int j, int e) {
        const float x = s[i][j].x[e], z = x * x;
        s[i][j].x[e] = x * (((a[3] * z + a[2]) * z + a[1]) * z + a[0]);
      });
    } else if (__all_sync(kAllLanes, most * fabsf(to_x) < 1.0F)) {
      for_each_entry<kM, kN>([&](int i, int j, int e) { s[i][j].x[e] = tanh_below_1(s[i][j].x[e] * to_x); });
    } else {
      constexpr bool kRough = S.type != Type::kFloat32 && S.head_dim > 16;  // sums of few are nearly exact
      for_each_entry<kM, kN>([&](int i, int j, int e) {
        s[i][j].x[e] = kRough ? tanh_beside_16_bits(s[i][j].x[e] * to_x) : tanh(s[i][j].x[e] * to_x);
      });
    }
  }

  /// s · scale − slope · distance.  Away from the diagonal one multiply-add has it; near it that costs digits.
  template <int kM, int kN>
  FOVEA_DEVICE void add_slopes(Accumulator (&s)[kM][kN], float scale, int row, int key) const {
    const int to_key = static_cast<int>(sequence.band.offset) - key;
    const bool away = rows.query(row) + to_key >= 2 * 8 * kN || rows.query(row + 16 * kM - 1) + to_key <= 0;
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      const int r = row + row_of(x / 2, x % 2 * 2);
      const float first = static_cast<float>(rows.query(r) + to_key - key_of(0, 0)), steep = slope(r);
      const float a_key = first > 0.0F ? steep : -steep;
      const auto entry = [&](int y) -> float& { return s[x / 2][y / 2].x[x % 2 * 2 + y % 2]; };
      const auto keys = [](int y) { return static_cast<float>(Order::of_entry(y / 2, y % 2)); };
      if (away) {
#pragma unroll
        for (int y = 0; y < 2 * kN; ++y)
          entry(y) = __fmaf_rn(entry(y), scale, __fmaf_rn(a_key, keys(y), -a_key * first));
      } else {
#pragma unroll
        for (int y = 0; y < 2 * kN; ++y) entry(y) = __fmaf_rn(entry(y), scale, -steep * fabsf(first - keys(y)));
      }
    }
  }

  /// What a product of 16 rows begins from, so that slopes are in it: −slope · distance over the scale, `steep` being
  /// slope over scale.  Where all keys lie on one side it is counted from the nearest one, the same for all rows, and
  /// `beside` is what each row lacks, in units of log2.
  template <int kN>
  FOVEA_DEVICE void begin_with_slopes(Accumulator (&s)[1][kN], float steep, int row, int key,
                                      float (&beside)[2]) const {
    const int to_key = static_cast<int>(sequence.band.offset) - key, last = 8 * kN - 1;
    const bool after = rows.query(row) + to_key >= last, before = rows.query(row + 15) + to_key <= 0;
    const auto keys = [](int y) { return static_cast<float>(Order::of_entry(y / 2, y % 2)); };
    if (after || before) {
      const float a_key = after ? steep : -steep;
      const float first = a_key * static_cast<float>(key_of(0, 0) - (after ? last : 0));
#pragma unroll
      for (int y = 0; y < 2 * kN; ++y) {
        const float x = __fmaf_rn(a_key, keys(y), first);
        s[0][y / 2].x[y % 2] = x, s[0][y / 2].x[2 + y % 2] = x;
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int far = rows.query(row + row_of(0, 2 * h)) + to_key - (after ? last : 0);
        beside[h] = -a_key * (p.scale * kLog2E) * static_cast<float>(far);
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float first = static_cast<float>(rows.query(row + row_of(0, 2 * h)) + to_key - key_of(0, 0));
#pragma unroll
        for (int y = 0; y < 2 * kN; ++y) s[0][y / 2].x[2 * h + y % 2] = -steep * fabsf(first - keys(y));
        beside[h] = 0.0F;
      }
    }
  }

  template <int kM, int kN, class Found>
  FOVEA_DEVICE void hide(Accumulator (&s)[kM][kN], int row, int key, const Sight& sight, const Found& entries) const {
    const bool partial = sight.band == TileState::kPartial;
    if constexpr (S.mask) {
      Found seen = entries;
      const bool all = sight.mask == TileState::kFull;
      if (all && !partial) return;
      if (partial) {
        each_row<kM>(row, key, [&](int i, int h, int begin, int end) { seen.narrow(i, h, begin, end, all); });
      }
      for_each_entry<kM, kN>([&](int i, int j, int e) {
        if (!seen.template sees<Order>(i, j, e)) s[i][j].x[e] = -infinity();
      });
      return;
    }
    if (!partial) return;
    static_assert(2 * kN <= 32);
    each_row<kM>(row, key, [&](int i, int h, int begin, int end) {
      keep_bits(s[i], h, bits_between(Order::before(begin), Order::before(end)));
    });
  }

  /// Calls f(i, h, begin, end) for the two queries of this lane in each piece: the keys that the band leaves them,
  /// counted from the lane's first one.
  template <int kM, class F>
  FOVEA_DEVICE void each_row(int row, int key, const F& f) const {
    const int first = key + key_of(0, 0);
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) {
      const int r = row + row_of(x / 2, x % 2 * 2);
      Interval seen = sequence.band.keys_of_row(rows.query(r));
      if (r >= rows.left()) seen = {0, 0};
      f(x / 2, x % 2, static_cast<int>(seen.begin) - first, static_cast<int>(seen.end) - first);
    }
  }

  /// A bias of −infinity hides, whatever the product was; where all are finite the sum says so by itself.
  template <int kM, int kN, class Found>
  FOVEA_DEVICE static void hide_by_bias(Accumulator (&s)[kM][kN], const Found& entries) {
    if constexpr (S.bias) {
      for_each_entry<kM, kN>([&](int i, int j, int e) {
        if (entries.bias_of(i, j, e) < kLowestBias) s[i][j].x[e] = -infinity();
      });
    }
  }

  // ---- dropout

  FOVEA_DEVICE math::DropoutStream stream(int head) const {
    return math::dropout_stream(p.seed, p.offset, static_cast<u32>(sequence.batch * p.q_heads + head));
  }

  /// Whether dropout keeps an entry.
  FOVEA_DEVICE bool kept(int r, int j) const {
    const int i = rows.query(r);
    return math::draws_of_patch(stream(rows.head(r)), math::patch_of(static_cast<u32>(i)),
                                math::patch_of(static_cast<u32>(j)))
               .at(i, j) < p.keep_threshold;
  }

  /// Calls f(j, e, kept) for the four entries that share the draw of entry e (0 or 1) of accumulator [i][j] of a piece,
  /// which begins at multiples of 16: two rows by two keys, 8 apart.
  template <class F>
  FOVEA_DEVICE void for_each_draw(int i, int j, int e, int row, int key, const math::DropoutStream& stream,
                                  const F& f) const {
    constexpr int kPair = Order::kGroups;  // pieces from a key to the one 8 on
    if constexpr (kPacking != Packing::kNone) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int piece = j + x % 2 * kPair, entry = x / 2 * 2 + e;
        f(piece, entry, kept(row + row_of(i, entry), key + key_of(piece, entry)));
      }
    } else {
      const u32 most = (p.keep_threshold << 16) - 1;  // of a draw kept, in the upper half of a word
      const u32 first = math::patch_of(key + Order::of_lane(threadIdx.x % 4));
      const math::Draws draws =
          math::draws_of_patch(stream, math::patch_of(static_cast<u32>(rows.first + row + row_of(i, 0))),
                               first + math::patch_of(Order::of_entry(j, e)));
#pragma unroll
      for (int low = 0; low < 2; ++low) {
        f(j, 2 * low + e, draws.words[low] << 16 <= most);
        f(j + kPair, 2 * low + e, draws.words[low] <= most);
      }
    }
  }
  /// Calls f(i, j, e, kept) for all entries of a piece.
  template <int kM, int kN, class F>
  FOVEA_DEVICE void for_each_draw(int row, int key, const math::DropoutStream& stream, const F& f) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        if (j / Order::kGroups % 2 != 0) continue;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          for_each_draw(i, j, e, row, key, stream, [&](int piece, int entry, bool kept) { f(i, piece, entry, kept); });
        }
      }
    }
  }
};

}  // namespace fovea::cuda
