#pragma once

#include "cpu/flash/scores.h"
#include "cpu/threads.h"

// FlashAttention's forward (2205.14135, algorithm 1; loop order of 2307.08691): a task owns a block of rows and walks
// the keys. S, P and the running statistics of one panel stay in L1; nothing of size seqlen_q × seqlen_kv exists.
namespace fovea::cpu::FOVEA_ISA {

/// What one worker needs, whatever the task.
struct ForwardScratch {
  Panel* panels;
  float *q, *o;               // [panel][dim][lane]
  float *maximum, *sum_of_p;  // [panel][lane], maximum in units of log2
  PackedRows k, v;            // of kForwardKeys keys
  float *s, *extra;           // [key][lane]: scores; bias or dropout
  std::int32_t* mask;         // [key][lane]
  float* row;                 // one row of q or out

  ForwardScratch(Arena& arena, const FlashCall& call, const ForwardShape& shape) {
    const i64 count = shape.block_rows / kPanelRows, tile = kForwardKeys * kPanelRows;
    panels = arena.take<Panel>(count);
    q = arena.take<float>(count * call.head_dim * kPanelRows);
    o = arena.take<float>(count * call.head_dim_v * kPanelRows);
    maximum = arena.take<float>(count * kPanelRows);
    sum_of_p = arena.take<float>(count * kPanelRows);
    k = PackedRows(arena, kForwardKeys, call.head_dim);
    v = PackedRows(arena, kForwardKeys, call.head_dim_v);
    s = arena.take<float>(tile);
    extra = arena.take<float>(tile);
    mask = arena.take<std::int32_t>(tile);
    row = arena.take<float>(math::larger(call.head_dim, call.head_dim_v));
  }
};

/// P V for values that are not finite: only rows that see them take part, so that 0 · NaN of a hidden entry never
/// happens.
inline void add_bad_values(float* o, const Tile& p, const bool* bad, const Panel& panel, const Context& context,
                           i64 kv_head) {
  const FlashCall& call = context.call;
  for (i64 r = 0; r < p.rows(); ++r) {
    const char* value = context.kv_row(call.v, p.keys.begin + r, kv_head);
    for (i64 lane = 0; bad[r] && lane < panel.rows; ++lane) {
      if (!context.visible(panel.query[lane], p.keys.begin + r, panel.head[lane])) continue;
      for (i64 c = 0; c < call.head_dim_v; ++c) {
        o[c * kPanelRows + lane] += p.row(r)[lane] * widen(value + c * bytes(call.type), call.type);
      }
    }
  }
}

/// S becomes P = 2^(S − running maximum); the running maximum and sum move on.  `rescale` is what O has to be
/// multiplied by.
inline void online_softmax(const Tile& s, float* maximum, float* sum_of_p, float* rescale) {
  FOVEA_UNROLL for (int n = 0; n < kPanelVectors; ++n) {
    const int lane = n * kWidth;
    V top = load(maximum + lane);
    for (i64 r = 0; r < s.rows(); ++r) top = larger(load(s.row(r) + lane), top);
    const V reference = top == splat(-kInfinity) ? V{} : top;  // nothing visible yet: keep −inf − −inf away
    const V factor = exp2(load(maximum + lane) - reference);
    V total = load(sum_of_p + lane) * factor;
    for (i64 r = 0; r < s.rows(); ++r) {
      const V p = exp2(load(s.row(r) + lane) - reference);
      store(s.row(r) + lane, p);
      total += p;
    }
    store(maximum + lane, top);
    store(sum_of_p + lane, total);
    store(rescale + lane, factor);
  }
}

/// Softmax of one finished row: adds the sink, normalises, writes out and lse.  An empty row gives 0 and −inf.
inline void write_row(const Context& context, i64 i, i64 head, float maximum, float sum_of_p, float* o) {
  const FlashCall& call = context.call;
  const bool empty = sum_of_p == 0.0F;  // a visible key leaves at least 1, or a NaN
  float factor = 1.0F;
  if (call.sink != nullptr && !empty) {
    const float sink = call.sink[head] * kLog2E;
    const float top = sink > maximum ? sink : maximum;
    factor = __builtin_exp2f(maximum - top);
    sum_of_p = sum_of_p * factor + __builtin_exp2f(sink - top);
    maximum = top;
  }
  const float normalise = empty ? 0.0F : factor / sum_of_p;
  for (i64 c = 0; c < call.head_dim_v; ++c) o[c] = empty ? 0.0F : o[c] * normalise;
  narrow_row(const_cast<char*>(context.q_row(call.out, i, head)), o, call.type, call.head_dim_v);
  if (call.lse.data != nullptr) {
    *context.statistic(call.lse, i, head) = empty ? -kInfinity : kLn2 * (maximum + __builtin_log2f(sum_of_p));
  }
}

/// What a split over the keys leaves of a row: O, maximum, sum.
inline i64 partial_floats(const FlashCall& call) { return call.head_dim_v + 2; }

class Forward {
 public:
  Forward(const FlashCall& call, const ForwardShape& shape, std::byte* workspace)
      : call_(call),
        shape_(shape),
        workspace_(workspace),
        scratch_bytes_(sizes(call, shape).scratch),
        partials_(reinterpret_cast<float*>(workspace + scratch_bytes_ * static_cast<std::size_t>(shape.workers))) {}

  static ForwardWorkspace sizes(const FlashCall& call, const ForwardShape& shape) {
    Arena counted(nullptr);
    ForwardScratch(counted, call, shape);
    const i64 rows = shape.key_splits > 1 ? call.batch * call.kv_heads * shape.max_rows * shape.key_splits : 0;
    return {counted.used(), static_cast<std::size_t>(rows * partial_floats(call)) * sizeof(float)};
  }

  void run() {
    const i64 blocks = call_.batch * call_.kv_heads * shape_.blocks;
    run_tasks(
        blocks * shape_.key_splits, shape_.workers,
        [](void* self, i64 index, int worker) { static_cast<Forward*>(self)->attend_block(index, worker); }, this);
    if (shape_.key_splits == 1) return;
    run_tasks(
        blocks, shape_.workers,
        [](void* self, i64 index, int worker) { static_cast<Forward*>(self)->combine_block(index, worker); }, this);
  }

 private:
  struct Block {
    i64 batch, kv_head, first_row, rows;
  };

  /// Blocks in the order of claiming: late rows first, which see the most under a causal rule.
  [[nodiscard]] Block block(i64 index) const {
    const i64 heads = call_.batch * call_.kv_heads;
    const i64 first_row = (shape_.blocks - 1 - index / heads) * shape_.block_rows;
    const i64 batch = index % heads / call_.kv_heads;
    const i64 rows = call_.sequences[batch].q_rows * group() - first_row;
    return {batch, index % call_.kv_heads, first_row, math::smaller(rows, shape_.block_rows)};
  }
  [[nodiscard]] i64 group() const { return call_.q_heads / call_.kv_heads; }
  [[nodiscard]] ForwardScratch scratch(int worker) const {
    Arena arena(workspace_ + scratch_bytes_ * static_cast<std::size_t>(worker));
    return {arena, call_, shape_};
  }
  [[nodiscard]] float* partial(const Block& block, i64 row, i64 split) const {
    const i64 head = block.batch * call_.kv_heads + block.kv_head;
    return partials_ + ((head * shape_.max_rows + row) * shape_.key_splits + split) * partial_floats(call_);
  }

  /// One block of rows against one part of the keys.
  void attend_block(i64 index, int worker) {
    const i64 split = index % shape_.key_splits;
    const Block block = this->block(index / shape_.key_splits);
    if (block.rows <= 0) return;
    const Context context{call_, call_.sequences[block.batch], block.batch};
    ForwardScratch my = scratch(worker);
    const i64 panels = (block.rows + kPanelRows - 1) / kPanelRows;
    const RowMap map{group(), block.kv_head * group(), block.first_row + block.rows};
    for (i64 p = 0; p < panels; ++p) {
      set_rows(my.panels[p], context, map, block.first_row + p * kPanelRows);
      pack_panel(my.q + p * call_.head_dim * kPanelRows, my.panels[p], context, call_.q, call_.head_dim, context.fold(),
                 my.row, nullptr, call_.head_dim, nullptr);
    }
    for (i64 x = 0; x < panels * kPanelRows; ++x) {
      my.maximum[x] = -kInfinity;
      my.sum_of_p[x] = 0.0F;
    }
    for (i64 x = 0; x < panels * kPanelRows * call_.head_dim_v; ++x) my.o[x] = 0.0F;

    Interval keys = context.sequence.band.keys_of_rows({my.panels[0].queries.begin, my.panels[panels - 1].queries.end});
    keys.begin = math::larger(keys.begin, split * shape_.keys_per_split);
    keys.end = math::smaller(keys.end, (split + 1) * shape_.keys_per_split);
    for (i64 j = keys.begin / kForwardKeys * kForwardKeys; j < keys.end; j += kForwardKeys) {
      const Interval tile{j, math::smaller(j + kForwardKeys, keys.end)};
      my.k.pack(context, call_.k, tile, block.kv_head);
      my.v.pack(context, call_.v, tile, block.kv_head);
      my.v.clear_bad(tile.end - tile.begin);
      for (i64 p = 0; p < panels; ++p) attend(my, p, context, tile, block.kv_head);
    }
    for (i64 p = 0; p < panels; ++p) store_panel(my, p, context, block, split);
  }

  /// One panel of queries against one tile of keys.
  void attend(ForwardScratch& my, i64 p, const Context& context, Interval tile, i64 kv_head) {
    const Panel& panel = my.panels[p];
    const math::Band& band = context.sequence.band;
    const Interval seen = band.keys_of_rows(panel.queries);
    const Interval keys{math::larger(tile.begin, seen.begin / 16 * 16), math::smaller(tile.end, seen.end)};
    const math::TileState state = keys.empty() ? math::TileState::kHidden : band.tile(panel.queries, keys);
    if (state == math::TileState::kHidden) return;
    if (call_.mask.data != nullptr && !gather_mask(my.mask, panel, context, keys)) return;

    const Tile s{my.s, kPanelRows, keys};
    const i64 skipped = keys.begin - tile.begin;
    product<ALayout::kRowMajor, Init::kZero, kPanelVectors>(  // S = K Qᵀ
        {my.k.row(skipped), my.k.stride, my.q + p * call_.head_dim * kPanelRows, kPanelRows, my.s, kPanelRows,
         call_.head_dim, nullptr},
        s.rows());
    finish_scores(s, panel, context, state, my.mask, my.extra, nullptr);

    alignas(64) float rescale[kPanelRows];
    online_softmax(s, my.maximum + p * kPanelRows, my.sum_of_p + p * kPanelRows, rescale);
    if (call_.keep_threshold < 65536) {
      dropout_factors(my.extra, panel, context, keys);
      for_each_vector(
          s, [&](i64 r, int lane, float* at) { store(at, load(at) * load(my.extra + r * kPanelRows + lane)); });
    }

    float* o = my.o + p * call_.head_dim_v * kPanelRows;
    product<ALayout::kColumnMajor, Init::kScaleAdd, kPanelVectors>(  // O = O · rescale + Vᵀ P
        {my.v.row(skipped), my.v.stride, my.s, kPanelRows, o, kPanelRows, s.rows(), rescale}, call_.head_dim_v);
    if (my.v.any_bad) add_bad_values(o, s, my.v.bad + skipped, panel, context, kv_head);
  }

  void store_panel(ForwardScratch& my, i64 p, const Context& context, const Block& block, i64 split) {
    const Panel& panel = my.panels[p];
    const float* o = my.o + p * call_.head_dim_v * kPanelRows;
    for (i64 lane = 0; lane < panel.rows; ++lane) {
      float* row = shape_.key_splits == 1 ? my.row : partial(block, block.first_row + p * kPanelRows + lane, split);
      for (i64 c = 0; c < call_.head_dim_v; ++c) row[c] = o[c * kPanelRows + lane];
      const float maximum = my.maximum[p * kPanelRows + lane], sum_of_p = my.sum_of_p[p * kPanelRows + lane];
      if (shape_.key_splits == 1) {
        write_row(context, panel.query[lane], panel.head[lane], maximum, sum_of_p, row);
      } else {
        row[call_.head_dim_v] = maximum;
        row[call_.head_dim_v + 1] = sum_of_p;
      }
    }
  }

  /// Puts together what the splits of each row left, in their order.
  void combine_block(i64 index, int worker) {
    const Block block = this->block(index);
    const Context context{call_, call_.sequences[block.batch], block.batch};
    const ForwardScratch my = scratch(worker);
    const i64 dim = call_.head_dim_v;
    for (i64 r = block.first_row; r < block.first_row + block.rows; ++r) {
      float maximum = -kInfinity, sum_of_p = 0.0F;
      for (i64 split = 0; split < shape_.key_splits; ++split) {
        const float top = partial(block, r, split)[dim];
        maximum = top > maximum ? top : maximum;
      }
      for (i64 c = 0; c < dim; ++c) my.row[c] = 0.0F;
      for (i64 split = 0; split < shape_.key_splits; ++split) {
        const float* part = partial(block, r, split);
        if (part[dim + 1] == 0.0F) continue;
        const float factor = __builtin_exp2f(part[dim] - maximum);
        sum_of_p += part[dim + 1] * factor;
        for (i64 c = 0; c < dim; ++c) my.row[c] += part[c] * factor;
      }
      write_row(context, r / group(), block.kv_head * group() + r % group(), maximum, sum_of_p, my.row);
    }
  }

  const FlashCall& call_;
  const ForwardShape& shape_;
  std::byte* workspace_;
  std::size_t scratch_bytes_;
  float* partials_;
};

}  // namespace fovea::cpu::FOVEA_ISA
