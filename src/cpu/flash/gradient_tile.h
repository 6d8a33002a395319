#pragma once

#include "cpu/flash/scores.h"

// What every part of the backward does with a panel of rows and a tile of keys: recompute P from q, k and lse, and
// dS = P ∘ (dP − delta) from dout and v (2205.14135, algorithm 4).
namespace fovea::cpu::FOVEA_ISA {

/// dS before the softcap; 0 where hidden, although tanh may be NaN there.
FOVEA_INLINE V before_softcap(V gradient, const float* tanh) {
  return gradient == V{} ? V{} : gradient * (splat(1.0F) - load(tanh) * load(tanh));
}

/// Row statistics of the backward, [kv head][row group][lane].
struct RowStats {
  float* log2_lse;  // +infinity where a row sees nothing, so that its P is 0
  float* delta;     // Σ dout·out − dlse: dS = P ∘ (dP − delta)
  float* sink;      // the row's part of dsink
};

/// Rows of q or dout of a group, packed for every product they are in.
template <Word kWord>
struct PackedGroup {
  i64 dim, words, padded;  // padded: the dim as whole vectors
  float* columns;          // [panel][word][lane]: B of products over the dims
  float* rows;             // [lane][row_words], those that are not finite as 0
  float* over_rows;        // B of products over the rows: `rows`, or its pairs [lane / 2][padded]
  bool* bad;               // [lane]: not finite

  PackedGroup(Arena& arena, i64 dim) : dim(dim), words(words_of<kWord>(dim)), padded(whole(dim, kWidth)) {
    columns = arena.take<float>(kGroupRows * words);
    over_rows = rows = arena.take<float>(kGroupRows * row_words<kWord>(dim));
    if constexpr (kWord == Word::kPair) over_rows = arena.take<float>(kGroupRows / 2 * padded);
    bad = arena.take<bool>(kGroupRows);
  }

  void load_panel(i64 p, const Panel& panel, const Context& context, const RowView& view, float factor) {
    const i64 first = p * kPanelRows, stride = row_words<kWord>(dim);
    pack_panel<kWord>(column(p), rows + first * stride, bad + first, panel, context, view, dim, factor);
    for (i64 lane = first; lane < first + kPanelRows; ++lane) {
      for (i64 w = 0; bad[lane] && w < stride; ++w) rows[lane * stride + w] = 0.0F;
    }
    for (i64 lane = first; kWord == Word::kPair && lane < first + kPanelRows; lane += 2) {
      const float *even = rows + lane * stride, *odd = even + stride;
      for (i64 c = 0; c < dim; c += kWidth) store(over_rows + lane / 2 * padded + c, pair_of_rows(even, odd, c));
    }
  }

  [[nodiscard]] float* column(i64 panel) const { return columns + panel * kPanelRows * words; }
  [[nodiscard]] float* from_row(i64 lane) const { return over_rows + lane / kPerWord<kWord> * padded; }
};

/// A group of kGroupRows rows, and P (with dropout) and dS of it and a tile of keys.
template <Word kWord>
struct RowGroup {
  static constexpr i64 kPanels = kGroupRows / kPanelRows, kWordStride = kGroupRows / kPerWord<kWord>;
  Panel* panels;  // kPanels
  PackedGroup<kWord> q, dout;
  float *log2_lse, *delta;    // [lane]
  bool any_bad = false;       // of q or dout
  float *s, *ds, *tanhs;      // [kKeyTile][kGroupRows]: P and dS, where pairs are multiplied only on demand; of softcap
  float *p_words, *ds_words;  // [kKeyTile][kGroupRows as words]: the same; floats are what `s` and `ds` hold
  float* ds_over_keys = nullptr;                  // [kKeyTile as words][kPanelRows], of pairs
  float *strip_s = nullptr, *strip_ds = nullptr;  // [kTileStrip][kPanelRows], of pairs: S and dP
  float* extra;                                   // [kKeyTile][kPanelRows]: dropout
  float* mask;                                    // [kKeyTile / 4][kPanelRows]

  RowGroup(Arena& arena, const FlashCall& call)
      : panels(arena.take<Panel>(kPanels)), q(arena, call.head_dim), dout(arena, call.head_dim_v) {
    log2_lse = arena.take<float>(kGroupRows);
    delta = arena.take<float>(kGroupRows);
    s = arena.take<float>(kKeyTile * kGroupRows);
    ds = arena.take<float>(kKeyTile * kGroupRows);
    tanhs = arena.take<float>(kKeyTile * kGroupRows);
    p_words = s, ds_words = ds;
    if constexpr (kWord == Word::kPair) {
      p_words = arena.take<float>(kKeyTile * kWordStride);
      ds_words = arena.take<float>(kKeyTile * kWordStride);
      ds_over_keys = arena.take<float>(kKeyTile / 2 * kPanelRows);
      strip_s = arena.take<float>(kTileStrip * kPanelRows);
      strip_ds = arena.take<float>(kTileStrip * kPanelRows);
    }
    extra = arena.take<float>(kKeyTile * kPanelRows);
    mask = arena.take<float>(kKeyTile / 4 * kPanelRows);
  }

  /// Packs rows [first_row, first_row + kGroupRows) of the map.  The statistics count rows of the whole group.
  void load_rows(const Context& context, const RowMap& map, i64 first_row, const RowStats& stats) {
    const FlashCall& call = context.call;
    const i64 group = call.q_heads / call.kv_heads;
    any_bad = false;
    for (i64 p = 0; p < kPanels; ++p) {
      const i64 at = p * kPanelRows;
      set_rows(panels[p], context, map, first_row + at);
      q.load_panel(p, panels[p], context, call.q, context.fold());
      dout.load_panel(p, panels[p], context, call.dout, 1.0F);
      for (i64 lane = 0; lane < kPanelRows; ++lane) {
        any_bad = any_bad || q.bad[at + lane] || dout.bad[at + lane];
        log2_lse[at + lane] = kInfinity;
        delta[at + lane] = 0.0F;
        if (lane >= panels[p].lanes) continue;
        const i64 from = panels[p].query[lane] * group + (group == 1 ? 0 : panels[p].head[lane] % group);
        log2_lse[at + lane] = stats.log2_lse[from];
        delta[at + lane] = stats.delta[from];
      }
    }
  }

  [[nodiscard]] Tile tile_of(float* data, i64 panel, Interval keys) const {
    return {data + panel * kPanelRows, kGroupRows, keys};
  }

  /// Keys of a strip, which is skipped where it is hidden.
  static constexpr i64 kStrip = kWord == Word::kPair ? kTileStrip : kKeyTile / 2;

  /// P and dS of one panel and `keys`, rows of k and v from `offset` on.  Returns the part of the keys that the panel
  /// may see; of the others P and dS are 0.  dS is that of the scores after the softcap, in words of pairs before it.
  Interval recompute(i64 p, const Context& context, Interval keys, const PackedRows<kWord>& k,
                     const PackedRows<kWord>& v, i64 offset, bool floats) {
    const Panel& panel = panels[p];
    MaskWords<kKeyTile> masks{mask, panel, context, keys};
    const bool entries = context.call.mask.data != nullptr || context.call.bias.data != nullptr;
    Interval seen{0, 0};
    const bool whole =
        kWord == Word::kFloat && context.sequence.band.tile(panel.queries, keys) == math::TileState::kFull;
    const i64 step = whole ? kKeyTile : kStrip;
    for (i64 first = 0; first < keys.end - keys.begin; first += step) {
      const Interval strip{keys.begin + first, math::smaller(keys.begin + first + step, keys.end)};
      const auto tile = [&](float* all, float* own) -> Tile {
        if (kWord == Word::kPair) return {own, kPanelRows, strip};
        return tile_of(all + first * kGroupRows, p, strip);
      };
      const Tile scores = tile(s, strip_s), dp = tile(ds, strip_ds);  // of floats dS takes dP's place
      math::TileState state = math::TileState::kHidden;
      if (panel.lanes > 0) state = context.sequence.band.tile(panel.queries, strip);
      if (state == math::TileState::kHidden || (context.call.mask.data != nullptr && !masks.shows(strip))) {
        clear_strip(p, strip, first, floats);
        continue;
      }
      seen = {seen.empty() ? first : seen.begin, first + scores.rows()};
      if (panel.lanes < kPanelRows) state = math::TileState::kPartial;  // hides the lanes without a row from NaN keys
      const i64 slice = entries ? kSlice<kWord> : scores.rows();
      for (i64 r = 0; r < scores.rows(); r += slice) {
        if (entries)
          fetch_next_tile(panel, context, {keys.begin - offset, keys.begin - offset + k.count}, keys, first + r,
                          first + r + slice);
        product_of_panel<kWord, ALayout::kRowMajor, Init::kZero>(  // S = K Qᵀ
            panel,
            {k.row(offset + first + r), k.stride, q.column(p), kPanelRows, scores.row(r), scores.stride, q.words},
            math::smaller(slice, scores.rows() - r));
      }
      product_of_panel<kWord, ALayout::kRowMajor, Init::kZero>(  // dP = V doutᵀ
          panel, {v.row(offset + first), v.stride, dout.column(p), kPanelRows, dp.data, dp.stride, dout.words},
          scores.rows());
      weigh_strip(p, context, scores, dp, state, masks.of(strip), first, floats);
    }
    return seen;
  }

 private:
  /// Prefetches, while keys [from, to) of a tile are multiplied, their share of the entries of the block's next tile,
  /// or after the last one of the first tile and the next row group.
  FOVEA_INLINE static void fetch_next_tile(const Panel& panel, const Context& context, Interval block, Interval keys,
                                           i64 from, i64 to) {
    const FlashCall& call = context.call;
    const bool last = keys.end == block.end;
    const i64 first = last ? block.begin : keys.end, rows = last ? kGroupRows / (call.q_heads / call.kv_heads) : 0;
    const Interval next{first, math::smaller(first + kKeyTile, block.end)};
    const i64 all = keys.end - keys.begin;
    const Interval lanes{from * kPanelRows / all, to * kPanelRows / all};
    if (call.mask.data != nullptr) fetch_entries(panel, context, call.mask, 1, next, lanes, rows);
    if (call.bias.data != nullptr) fetch_entries(panel, context, call.bias, bytes(call.bias_type), next, lanes, rows);
  }

  /// P = 2^(S − lse) and dS = P ∘ (dP − delta), from row `first` of the tile on.
  void weigh_strip(i64 p, const Context& context, const Tile& strip, const Tile& dp, math::TileState state,
                   const float* words, i64 first, bool floats) {
    constexpr int kRows = kPerWord<kWord>, kVectors = kRows * kPanelVectors;  // at a time
    const FlashCall& call = context.call;
    const Tile tanh_tile = tile_of(tanhs + first * kGroupRows, p, strip.keys);
    const float scale = finish_scores<kWord>(strip, panels[p], context, state, words, extra, &tanh_tile);
    const Tile scores = hide_past_end<kWord>(strip);
    const Tile weights = tile_of(s + first * kGroupRows, p, scores.keys),
               gradients = tile_of(ds + first * kGroupRows, p, scores.keys);
    const bool dropout = call.keep_threshold < 65536;
    const bool hides = state == math::TileState::kPartial || call.mask.data != nullptr || call.bias.data != nullptr ||
                       scores.rows() > strip.rows();
    if (dropout) dropout_factors(extra, panels[p], context, scores.keys);
    const float *lse = log2_lse + p * kPanelRows, *shift = delta + p * kPanelRows;
    for (i64 r = 0; r < scores.rows(); r += kRows) {
      V score[kVectors], weight[kVectors], gradient[kVectors];
      const auto each = [r](auto&& f) {
        FOVEA_UNROLL for (int x = 0; x < kVectors; ++x) f(x, r + x / kPanelVectors, x % kPanelVectors * kWidth);
      };
      each([&](int x, i64 row, int lane) { score[x] = load(scores.row(row) + lane); });
      // No weight is above 1, whatever the digits lost in scores of a million; NaN stays.
      each([&](int x, i64 /*row*/, int lane) {
        const V log = score[x] * scale - load(lse + lane);
        weight[x] = log > V{} ? V{} : log;
      });
      exp2(weight);
      each([&](int x, i64 row, int lane) { gradient[x] = load(dp.row(row) + lane); });
      if (dropout) each([&](int x, i64 row, int lane) { gradient[x] *= load(extra + row * kPanelRows + lane); });
      each([&](int x, i64 /*row*/, int lane) { gradient[x] = weight[x] * (gradient[x] - load(shift + lane)); });
      if (dropout) each([&](int x, i64 row, int lane) { weight[x] *= load(extra + row * kPanelRows + lane); });
      if (hides) {
        each([&](int x, i64 /*row*/, int /*lane*/) {
          const VI hidden = score[x] == splat(-kInfinity);
          gradient[x] = hidden ? V{} : gradient[x];
          weight[x] = hidden ? V{} : weight[x];
        });
      }
      if (kWord == Word::kFloat || floats) {
        each([&](int x, i64 row, int lane) {
          store(weights.row(row) + lane, weight[x]);
          store(gradients.row(row) + lane, gradient[x]);
        });
      }
      if constexpr (kWord == Word::kPair) {
        if (call.softcap > 0) {
          each([&](int x, i64 row, int lane) { gradient[x] = before_softcap(gradient[x], tanh_tile.row(row) + lane); });
        }
        const i64 place = (first + r) * kWordStride + p * kPanelRows / 2;
        float *p_to = p_words + place, *ds_to = ds_words + place;
        FOVEA_UNROLL for (int n = 0; n < kPanelVectors; ++n) {
          const V p_pairs = round_to_pairs(weight[n], weight[n + kPanelVectors]);
          const V ds_pairs = round_to_pairs(gradient[n], gradient[n + kPanelVectors]);
          store_apart(p_to + n * kWidth / 2, p_to + kWordStride + n * kWidth / 2, p_pairs);
          store_apart(ds_to + n * kWidth / 2, ds_to + kWordStride + n * kWidth / 2, ds_pairs);
          store(ds_over_keys + (first + r) / 2 * kPanelRows + n * kWidth, side_by_side(ds_pairs));
        }
      }
    }
  }

  /// Zeros for P and dS of a strip, as words up to a whole depth.
  void clear_strip(i64 p, Interval keys, i64 first, bool floats) {
    if (kWord == Word::kFloat || floats) {
      const Tile gradients = tile_of(ds + first * kGroupRows, p, keys);
      for_each_vector(tile_of(s + first * kGroupRows, p, keys),
                      [&](i64 r, int lane, float* x) { store(x, V{}), store(gradients.row(r) + lane, V{}); });
    }
    if (kWord == Word::kFloat) return;
    for (i64 r = first; r < first + whole(keys.end - keys.begin, kKeyStep<kWord>); ++r) {
      const i64 at = r * kWordStride + p * kPanelRows / 2;
      for (i64 w = at; w < at + kPanelRows / 2; ++w) p_words[w] = ds_words[w] = 0.0F;
      for (i64 lane = 0; lane < kPanelRows; ++lane) ds_over_keys[r / 2 * kPanelRows + lane] = 0.0F;
    }
  }
};

}  // namespace fovea::cpu::FOVEA_ISA
