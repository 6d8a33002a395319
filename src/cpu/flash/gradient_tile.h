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

/// A group of kGroupRows rows, packed for the products.
struct RowGroup {
  static constexpr i64 kPanels = kGroupRows / kPanelRows;
  Panel* panels;              // kPanels
  float *q, *dout;            // [panel][dim][lane]
  float *q_rows, *dout_rows;  // [lane][padded dim], rows that are not finite as 0
  bool *bad_q, *bad_dout;     // [lane]
  float *log2_lse, *delta;    // [lane]
  float *s, *ds, *tanhs;      // [kKeyTile][kGroupRows]: scores, then P; dP, then dS; of softcap
  float* extra;               // [kKeyTile][kPanelRows]: bias or dropout
  std::int32_t* mask;         // [kKeyTile][kPanelRows]
  i64 padded, padded_v;       // head dims as whole vectors

  static i64 whole_vectors(i64 dim) { return (dim + kWidth - 1) / kWidth * kWidth; }

  RowGroup(Arena& arena, const FlashCall& call)
      : padded(whole_vectors(call.head_dim)), padded_v(whole_vectors(call.head_dim_v)) {
    panels = arena.take<Panel>(kPanels);
    q = arena.take<float>(kGroupRows * call.head_dim);
    dout = arena.take<float>(kGroupRows * call.head_dim_v);
    q_rows = arena.take<float>(kGroupRows * padded);
    dout_rows = arena.take<float>(kGroupRows * padded_v);
    bad_q = arena.take<bool>(kGroupRows);
    bad_dout = arena.take<bool>(kGroupRows);
    log2_lse = arena.take<float>(kGroupRows);
    delta = arena.take<float>(kGroupRows);
    s = arena.take<float>(kKeyTile * kGroupRows);
    ds = arena.take<float>(kKeyTile * kGroupRows);
    tanhs = arena.take<float>(kKeyTile * kGroupRows);
    extra = arena.take<float>(kKeyTile * kPanelRows);
    mask = arena.take<std::int32_t>(kKeyTile * kPanelRows);
  }

  /// Packs rows [first_row, first_row + kGroupRows) of the map.
  void load_rows(const Context& context, const RowMap& map, i64 first_row, const RowStats& stats) {
    const FlashCall& call = context.call;
    const i64 group = call.q_heads / call.kv_heads;
    for (i64 p = 0; p < kPanels; ++p) {
      const i64 at = p * kPanelRows;
      set_rows(panels[p], context, map, first_row + at);
      pack_panel(q + at * call.head_dim, panels[p], context, call.q, call.head_dim, context.fold(), nullptr,
                 q_rows + at * padded, padded, bad_q + at);
      pack_panel(dout + at * call.head_dim_v, panels[p], context, call.dout, call.head_dim_v, 1.0F, nullptr,
                 dout_rows + at * padded_v, padded_v, bad_dout + at);
      for (i64 lane = 0; lane < kPanelRows; ++lane) {
        log2_lse[at + lane] = kInfinity;
        delta[at + lane] = 0.0F;
        if (lane >= panels[p].rows) continue;
        const i64 from =
            panels[p].query[lane] * group + panels[p].head[lane] % group;  // stats count rows of the whole group
        log2_lse[at + lane] = stats.log2_lse[from];
        delta[at + lane] = stats.delta[from];
      }
    }
  }

  [[nodiscard]] Interval queries() const {
    i64 last = 0;
    while (last + 1 < kPanels && panels[last + 1].rows > 0) ++last;
    return {panels[0].queries.begin, panels[last].queries.end};
  }

  [[nodiscard]] Tile tile_of(float* data, i64 panel, Interval keys) const {
    return {data + panel * kPanelRows, kGroupRows, keys};
  }

  /// One panel against keys [keys): `s` receives P with dropout, `ds` the gradient of the scores after softcap.  Those
  /// keys are the rows of k and v from `at`.  False, and nothing computed, where the panel sees none of them.
  bool recompute(i64 p, const Context& context, Interval keys, const PackedRows& k, const PackedRows& v, i64 at) {
    const FlashCall& call = context.call;
    const Panel& panel = panels[p];
    math::TileState state =
        panel.rows == 0 ? math::TileState::kHidden : context.sequence.band.tile(panel.queries, keys);
    if (state == math::TileState::kHidden) return false;
    if (panel.rows < kPanelRows) state = math::TileState::kPartial;  // hides the lanes without a row from NaN keys
    if (call.mask.data != nullptr && !gather_mask(mask, panel, context, keys)) return false;
    const Tile scores = tile_of(s, p, keys), gradient = tile_of(ds, p, keys), tanh_tile = tile_of(tanhs, p, keys);
    const i64 rows = p * kPanelRows;

    product<ALayout::kRowMajor, Init::kZero, kPanelVectors>(  // S = K Qᵀ
        {k.row(at), k.stride, q + rows * call.head_dim, kPanelRows, scores.data, kGroupRows, call.head_dim, nullptr},
        scores.rows());
    finish_scores(scores, panel, context, state, mask, extra, &tanh_tile);
    product<ALayout::kRowMajor, Init::kZero, kPanelVectors>(  // dP = V doutᵀ
        {v.row(at), v.stride, dout + rows * call.head_dim_v, kPanelRows, gradient.data, kGroupRows, call.head_dim_v,
         nullptr},
        scores.rows());

    const bool dropout = call.keep_threshold < 65536;
    if (dropout) dropout_factors(extra, panel, context, keys);
    for_each_vector(scores, [&](i64 r, int lane, float* weight_at) {
      const V score = load(weight_at);
      const VI hidden = score == splat(-kInfinity);
      const V weight = exp2(score - load(log2_lse + rows + lane));
      const V factor = dropout ? load(extra + r * kPanelRows + lane) : splat(1.0F);
      float* d = gradient.row(r) + lane;
      store(d, hidden ? V{} : weight * (load(d) * factor - load(delta + rows + lane)));
      store(weight_at, hidden ? V{} : weight * factor);
    });
    return true;
  }
};

}  // namespace fovea::cpu::FOVEA_ISA
