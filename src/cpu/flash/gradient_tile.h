#pragma once

#include "cpu/flash/scores.h"

// What every part of the backward does with a panel of rows and a tile of keys: recompute P from q, k and lse, and
// dS = P ∘ (dP − delta) from dout and v (2205.14135, algorithm 4).
namespace fovea::cpu::FOVEA_ISA {

/// Statistics of the rows that the backward reads again and again, by (kv head, row group, lane).
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

/// A group of kGroupRows rows and what a tile of keys makes of them.
template <Word kWord>
struct RowGroup {
  static constexpr i64 kPanels = kGroupRows / kPanelRows;
  Panel* panels;  // kPanels
  PackedGroup<kWord> q, dout;
  float *log2_lse, *delta;  // [lane]
  float *s, *ds, *tanhs;    // [kKeyTile][kGroupRows]: scores, then P; dP, then dS; of softcap
  float* extra;             // [kKeyTile][kPanelRows]: bias, dropout or pairs
  float* mask;              // [kKeyTile / 4][kPanelRows]

  RowGroup(Arena& arena, const FlashCall& call)
      : panels(arena.take<Panel>(kPanels)), q(arena, call.head_dim), dout(arena, call.head_dim_v) {
    log2_lse = arena.take<float>(kGroupRows);
    delta = arena.take<float>(kGroupRows);
    s = arena.take<float>(kKeyTile * kGroupRows);
    ds = arena.take<float>(kKeyTile * kGroupRows);
    tanhs = arena.take<float>(kKeyTile * kGroupRows);
    extra = arena.take<float>(kKeyTile * kPanelRows);
    mask = arena.take<float>(kKeyTile / 4 * kPanelRows);
  }

  /// Packs rows [first_row, first_row + kGroupRows) of the map.
  void load_rows(const Context& context, const RowMap& map, i64 first_row, const RowStats& stats) {
    const FlashCall& call = context.call;
    const i64 group = call.q_heads / call.kv_heads;
    for (i64 p = 0; p < kPanels; ++p) {
      const i64 at = p * kPanelRows;
      set_rows(panels[p], context, map, first_row + at);
      q.load_panel(p, panels[p], context, call.q, context.fold());
      dout.load_panel(p, panels[p], context, call.dout, 1.0F);
      for (i64 lane = 0; lane < kPanelRows; ++lane) {
        log2_lse[at + lane] = kInfinity;
        delta[at + lane] = 0.0F;
        if (lane >= panels[p].lanes) continue;
        const i64 from =
            panels[p].query[lane] * group + panels[p].head[lane] % group;  // stats count rows of the whole group
        log2_lse[at + lane] = stats.log2_lse[from];
        delta[at + lane] = stats.delta[from];
      }
    }
  }

  [[nodiscard]] Tile tile_of(float* data, i64 panel, Interval keys) const {
    return {data + panel * kPanelRows, kGroupRows, keys};
  }

  /// One panel against keys [keys): `s` receives P with dropout, `ds` the gradient of the scores after softcap.  Those
  /// keys are the rows of k and v from `at`.  False where the panel sees none of them, and both are 0.
  bool recompute(i64 p, const Context& context, Interval keys, const PackedRows<kWord>& k, const PackedRows<kWord>& v,
                 i64 at) {
    constexpr i64 kStrip = kWord == Word::kPair ? kTileStrip : kKeyTile;
    bool seen = false;
    for (i64 j = keys.begin; j < keys.end; j += kStrip) {
      const Interval strip{j, math::smaller(j + kStrip, keys.end)};
      const i64 first = (j - keys.begin) * kGroupRows;
      const Tile scores = tile_of(s + first, p, strip), gradient = tile_of(ds + first, p, strip);
      if (recompute_strip(p, context, scores, gradient, tile_of(tanhs + first, p, strip), k, v, at + j - keys.begin)) {
        seen = true;
      } else {
        for_each_vector(gradient, [&](i64 r, int lane, float* x) { store(x, V{}), store(scores.row(r) + lane, V{}); });
      }
    }
    return seen;
  }

 private:
  bool recompute_strip(i64 p, const Context& context, const Tile& scores, const Tile& gradient, const Tile& tanh_tile,
                       const PackedRows<kWord>& k, const PackedRows<kWord>& v, i64 at) {
    const FlashCall& call = context.call;
    const Panel& panel = panels[p];
    math::TileState state =
        panel.lanes == 0 ? math::TileState::kHidden : context.sequence.band.tile(panel.queries, scores.keys);
    if (state == math::TileState::kHidden) return false;
    if (panel.lanes < kPanelRows) state = math::TileState::kPartial;  // hides the lanes without a row from NaN keys
    if (call.mask.data != nullptr && !gather(mask, panel, context, call.mask, 1, scores.keys)) return false;

    product<kWord, ALayout::kRowMajor, Init::kZero, kPanelVectors>(  // S = K Qᵀ
        {k.row(at), k.stride, q.column(p), kPanelRows, scores.data, kGroupRows, q.words}, scores.rows());
    product<kWord, ALayout::kRowMajor, Init::kZero, kPanelVectors>(  // dP = V doutᵀ
        {v.row(at), v.stride, dout.column(p), kPanelRows, gradient.data, kGroupRows, dout.words}, scores.rows());
    const float scale = finish_scores<kWord>(scores, panel, context, state, mask, extra, &tanh_tile);

    const bool dropout = call.keep_threshold < 65536;
    const bool hides = state == math::TileState::kPartial || call.mask.data != nullptr || call.bias.data != nullptr;
    if (dropout) dropout_factors(extra, panel, context, scores.keys);
    const float *lse = log2_lse + p * kPanelRows, *shift = delta + p * kPanelRows;
    for (i64 r = 0; r < scores.rows(); ++r) {
      V score[kPanelVectors], weight[kPanelVectors], slope[kPanelVectors];
      const auto each = [](auto&& f) { FOVEA_UNROLL for (int n = 0; n < kPanelVectors; ++n) f(n, n * kWidth); };
      each([&](int n, int lane) { score[n] = load(scores.row(r) + lane); });
      each([&](int n, int lane) { weight[n] = score[n] * scale - load(lse + lane); });
      exp2(weight);
      each([&](int n, int lane) { slope[n] = load(gradient.row(r) + lane); });
      if (dropout) each([&](int n, int lane) { slope[n] *= load(extra + r * kPanelRows + lane); });
      each([&](int n, int lane) { slope[n] = weight[n] * (slope[n] - load(shift + lane)); });
      if (dropout) each([&](int n, int lane) { weight[n] *= load(extra + r * kPanelRows + lane); });
      if (hides) {
        each([&](int n, int /*lane*/) {
          const VI hidden = score[n] == splat(-kInfinity);
          slope[n] = hidden ? V{} : slope[n];
          weight[n] = hidden ? V{} : weight[n];
        });
      }
      each([&](int n, int lane) { store(gradient.row(r) + lane, slope[n]), store(scores.row(r) + lane, weight[n]); });
    }
    return true;
  }
};

}  // namespace fovea::cpu::FOVEA_ISA
