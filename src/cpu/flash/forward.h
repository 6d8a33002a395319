#pragma once

#include "cpu/flash/few_rows.h"
#include "cpu/flash/scores.h"

// FlashAttention's forward (2205.14135, algorithm 1; loop order of 2307.08691): a task owns a block of rows and walks
// the keys. S, P and the running statistics of one panel stay in L1; nothing of size seqlen_q × seqlen_kv exists.  The
// papers' m, which need not be the maximum here, is `reference`, in units of log2; their l is `sum_of_p`.
namespace fovea::cpu::FOVEA_ISA {

/// Keys that are packed together, and the strips in which a panel walks them.  As pairs, P of all strips stays in L1,
/// and O is loaded and stored once for all of them.
template <Word kWord>
inline constexpr i64 kPackedKeys = kWord == Word::kPair ? 2 * kForwardKeys : 4 * kForwardKeys;
template <Word kWord>
inline constexpr i64 kStripKeys = kWord == Word::kPair ? kTileStrip : kForwardKeys;
/// Keys whose mask is read at a time.
template <Word kWord>
inline constexpr i64 kMaskKeys = kWord == Word::kPair ? kPackedKeys<kWord> : kStripKeys<kWord>;

/// The memory of one worker, for any task.
template <Word kWord>
struct ForwardScratch {
  i64 q_floats, o_floats;  // of a panel
  Panel* panels;
  float *q, *o;                 // [panel][word or dim][lane], of few rows [head][row][vector]
  float *reference, *sum_of_p;  // [panel][lane], reference in units of log2
  PackedRows<kWord> k, v;       // of kPackedKeys keys
  PackedColumns<kWord> v_columns;
  float *s, *extra;  // [key][lane], S of few rows for all heads: scores; dropout
  float* pairs;      // [key / 2][lane] of kPackedKeys keys: P
  float* mask;       // [key / 4][lane] of kMaskKeys keys
  float* rows;       // of q or out, as they lie
  bool* bad;         // [lane]

  ForwardScratch(Arena& arena, const FlashCall& call, const ForwardShape& shape)
      : q_floats(words_of<kWord>(call.head_dim) * kPanelRows), o_floats(whole(call.head_dim_v, kWidth) * kPanelRows) {
    const i64 count = math::larger(shape.block_rows / kPanelRows, shape.heads_a_task);
    i64 tile = kStripKeys<kWord> * kPanelRows, all = tile;
    if (shape.row_lanes > 0) {
      const i64 rows = kWidth / shape.row_lanes;  // contiguous, so that they stay in L1
      q_floats = rows * RowVectors(call.head_dim).floats;
      o_floats = rows * RowVectors(call.head_dim_v).floats;
      all = math::larger(tile, shape.heads_a_task * kJoinedKeys * kPanelRows);
    }
    panels = arena.take<Panel>(count);
    q = arena.take<float>(count * q_floats);
    o = arena.take<float>(count * o_floats);
    reference = arena.take<float>(count * kPanelRows);
    sum_of_p = arena.take<float>(count * kPanelRows);
    k = {arena, kPackedKeys<kWord>, call.head_dim};
    v = {arena, kPackedKeys<kWord>, call.head_dim_v};
    v_columns = {arena, kPackedKeys<kWord>, call.head_dim_v};
    s = arena.take<float>(all);
    extra = arena.take<float>(tile);
    pairs = arena.take<float>(kWord == Word::kPair ? kPackedKeys<kWord> / 2 * kPanelRows : 0);
    mask = arena.take<float>(kMaskKeys<kWord> / 4 * kPanelRows);
    rows = arena.take<float>(kPanelRows * whole(math::larger(call.head_dim, call.head_dim_v), kWidth));
    bad = arena.take<bool>(kPanelRows);
  }
};

/// P V for values that are not finite, only for rows that see them, so that a hidden entry never gives 0 · NaN.
/// at(c, lane): the place of element c of a lane's row in O.
template <class At>
inline void add_bad_values(float* o, const Tile& p, const bool* bad, const Panel& panel, const Context& context,
                           i64 kv_head, At&& at) {
  const FlashCall& call = context.call;
  for (i64 r = 0; r < p.rows(); ++r) {
    const char* value = context.kv_row(call.v, p.keys.begin + r, kv_head);
    for (i64 lane = 0; bad[r] && lane < panel.lanes; lane += panel.parts) {
      if (!context.visible(panel.query[lane], p.keys.begin + r, panel.head[lane])) continue;
      for (i64 c = 0; c < call.head_dim_v; ++c)
        o[at(c, lane)] += p.row(r)[lane] * widen(value + c * bytes(call.type), call.type);
    }
  }
}

/// The reference of a row moves only when a score exceeds it by this much, in units of log2: P stays below 2^8, and O
/// is hardly ever rescaled.
inline constexpr float kSlack = 8.0F, kMostWeight = 256.0F;

/// S · scale − base rounds once, base, which is such a product, by itself: they differ by up to |base| · 2^-24, of
/// which P takes the power.  From this on S is multiplied first, and a row's largest P is 2^0 whatever the scores.
inline constexpr float kFar = 0x1p24F;

/// Inputs and results of the softmax of a strip of scores.
struct SoftmaxOf {
  float scale;                            // of S
  float *reference, *sum_of_p, *rescale;  // [lane]
  const float* kept;                      // dropout factors, where there is dropout
  float* pairs;                           // receives P as pairs of keys, if words are pairs
};

/// S becomes P = 2^(S · scale − base), is added to `total`, and dropped out: the first kVectors vectors of a panel.
template <Word kWord, int kVectors>
FOVEA_INLINE void weigh(const Tile& s, const SoftmaxOf& of, bool keep_floats, const V (&base)[kVectors],
                        V (&total)[kVectors]) {
  constexpr int kRows = kPerWord<kWord>;  // at a time
  for (i64 r = 0; r < s.rows(); r += kRows) {
    V p[kRows * kVectors];
    const auto each = [&](auto&& f) {
      FOVEA_UNROLL for (int x = 0; x < kRows * kVectors; ++x) f(p[x], r + x / kVectors, x % kVectors);
    };
    each([&](V& x, i64 row, int n) { x = load(s.row(row) + n * kWidth) * of.scale - base[n]; });
    exp2(p);
    each([&](V& x, i64 /*row*/, int n) { total[n] += x; });
    if (of.kept != nullptr) each([&](V& x, i64 row, int n) { x *= load(of.kept + row * kPanelRows + n * kWidth); });
    if (keep_floats) each([&](V& x, i64 row, int n) { store(s.row(row) + n * kWidth, x); });
    if constexpr (kWord == Word::kPair) {  // a NaN is in the total, which makes the row NaN
      FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {
        store(of.pairs + r / 2 * kPanelRows + n * kWidth, round_side_by_side(p[n], p[n + kVectors]));
      }
    }
  }
}

/// S becomes P by the reference it has, without a search for larger scores.  False, and S unchanged, where the
/// reference has to move, is far or there is none yet.
template <Word kWord, int kVectors>
inline bool softmax_by_old_reference(const Tile& s, const SoftmaxOf& of) {
  V base[kVectors], total[kVectors] = {};
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {
    base[n] = load(of.reference + n * kWidth);
    if (any(absolute(base[n]) > splat(kFar))) return false;  // −inf, too
  }
  weigh<kWord>(s, of, false, base, total);
  bool stays = true;
  FOVEA_UNROLL for (const V& x : total) stays = stays && !any(~(x <= splat(kMostWeight)));  // NaN does not
  if (!stays) return false;
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n)
      store(of.sum_of_p + n * kWidth, load(of.sum_of_p + n * kWidth) + total[n]);
  return true;
}

/// The same together with the product, where S = K Qᵀ needs nothing but its softmax: S becomes P in registers.  Where
/// this returns false, S has not been stored.
template <int kVectors>
[[gnu::noinline]] bool weigh_product(const ProductArgs& args, i64 rows, const float* reference, float* sum_of_p) {
  V base[kVectors], top[kVectors] = {}, total[kVectors] = {};
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {
    base[n] = load(reference + n * kWidth);
    if (any(base[n] == splat(-kInfinity))) return false;
  }
  product_rows<Word::kFloat, ALayout::kRowMajor, kVectors>(
      args, 0, rows, [&](float* to, V(&x)[kVectors]) __attribute__((always_inline)) {
        FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) top[n] = larger(x[n] -= base[n], top[n]);
        exp2(x);
        FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) store(to + n * kWidth, x[n]), total[n] += x[n];
      });
  bool stays = true;
  FOVEA_UNROLL for (const V& x : top) stays = stays && !any(x > splat(kSlack));
  if (!stays) return false;
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) store(sum_of_p + n * kWidth, load(sum_of_p + n * kWidth) + total[n]);
  return true;
}

/// S becomes P with dropout; updates reference and sum.  True where O has to be multiplied by `rescale`.
template <Word kWord, int kVectors>
inline bool online_softmax(const Tile& s, SoftmaxOf of, bool keep_floats) {
  if (kWord == Word::kPair && !keep_floats && softmax_by_old_reference<kWord, kVectors>(s, of)) return false;
  V top[kVectors], base[kVectors], sum_before[kVectors], total[kVectors] = {};
  FOVEA_UNROLL for (V& x : top) x = splat(-kInfinity);
  for_each_vector<kVectors>(s, [&](i64 /*r*/, int lane, const float* at) {
    V& x = top[lane / kWidth];
    x = larger(load(at), x);
  });
  bool moved = false, far = false;
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {
    const V highest = top[n] * of.scale, before = load(of.reference + n * kWidth);
    const V after = highest > before + kSlack ? highest : before;
    base[n] = after == splat(-kInfinity) ? V{} : after;  // nothing visible yet: keep −inf − −inf away
    const V factor = after == before ? splat(1.0F) : exp2(before - base[n]);
    sum_before[n] = load(of.sum_of_p + n * kWidth) * factor;
    moved = moved || any((after != before) & (before != splat(-kInfinity)));
    store(of.reference + n * kWidth, after);
    store(of.rescale + n * kWidth, factor);
    far = far || any(absolute(base[n]) > splat(kFar));
  }
  if (kWord == Word::kPair && far) {
    for_each_vector<kVectors>(s, [&](i64 /*r*/, int /*lane*/, float* at) { store(at, load(at) * of.scale); });
    of.scale = 1.0F;
  }
  weigh<kWord>(s, of, keep_floats, base, total);
  FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) store(of.sum_of_p + n * kWidth, sum_before[n] + total[n]);
  return moved;
}

/// Softmax of one finished row: adds the sink, normalises, writes out and lse.  An empty row gives 0 and −inf.
inline void write_row(const Context& context, i64 i, i64 head, float reference, float sum_of_p, float* o) {
  const FlashCall& call = context.call;
  const bool empty = sum_of_p == 0.0F;  // a score above −inf leaves at least 1, or a NaN
  float factor = 1.0F;
  if (call.sink != nullptr && !empty) {
    const float sink = call.sink[head] * kLog2E;
    const float top = sink > reference ? sink : reference;
    factor = __builtin_exp2f(reference - top);
    sum_of_p = sum_of_p * factor + __builtin_exp2f(sink - top);
    reference = top;
  }
  const float normalise = empty ? 0.0F : factor / sum_of_p;
  for (i64 c = 0; c < call.head_dim_v; ++c) o[c] = empty ? 0.0F : o[c] * normalise;
  context.write_row(call.out, context.q_row(call.out, i, head), o, call.head_dim_v);
  if (call.lse.data != nullptr) {
    *context.statistic(call.lse, i, head) = empty ? -kInfinity : kLn2 * (reference + __builtin_log2f(sum_of_p));
  }
}

/// Floats of a split's partial result for a row: O, reference, sum.
inline i64 partial_floats(const FlashCall& call) { return call.head_dim_v + 2; }

template <Word kWord>
class Forward {
 public:
  Forward(const FlashCall& call, const ForwardShape& shape, std::byte* workspace)
      : call_(call), shape_(shape), scratch_(Arena::bytes_of<ForwardScratch<kWord>>(call, shape)) {
    Arena arena(workspace);
    workspace_ = arena.take<std::byte>(scratch_ * shape.workers);
    partials_ = arena.take<float>(
        shape.key_splits > 1 ? heads() * shape.max_rows * shape.key_splits * partial_floats(call) : 0);
    bytes_ = arena.used();
  }

  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }

  void run() {
    const i64 blocks = heads() * shape_.blocks;
    const i64 tasks = blocks / shape_.heads_a_task * shape_.key_splits + shape_.cut_blocks * (pieces() - 1);
    run_steps<&Forward::attend_block>(*this, tasks, shape_.workers);
    if (shape_.key_splits > 1) run_steps<&Forward::combine_block>(*this, blocks, shape_.workers);
  }

 private:
  struct Block {
    i64 batch, kv_head, first_row, rows;
  };

  /// Block `index` in the order in which they are claimed: late rows first, which see the most under a causal rule; of
  /// equal rows all heads, which mostly lie in the same pages.
  [[nodiscard]] Block block(i64 index, i64 splits, i64 heads_a_task) const {
    const i64 heads = this->heads() / heads_a_task, whole = heads * shape_.blocks * splits - shape_.cut_blocks;
    i64 first = 0, most = shape_.block_rows;  // of the block's rows
    if (index >= whole && shape_.cut_blocks > 0) {
      first = (pieces() - 1 - (index - whole) % pieces()) * shape_.piece_rows;
      most = math::smaller(shape_.piece_rows, shape_.block_rows - first);
      index = whole + (index - whole) / pieces();
    }
    first += (shape_.blocks - 1 - index / heads / splits) * shape_.block_rows;
    const i64 head = index % heads * heads_a_task, batch = head / call_.kv_heads;
    const i64 rows = call_.sequences[batch].q_rows * group() - first;
    return {batch, head % call_.kv_heads, first, math::smaller(rows, most)};
  }
  /// The rows of panel p of a task: a part of its rows, or a head.
  [[nodiscard]] Block panel_of(const Block& block, i64 p) const {
    if (shape_.heads_a_task > 1) return {block.batch, block.kv_head + p, block.first_row, block.rows};
    return {block.batch, block.kv_head, block.first_row + p * kPanelRows, block.rows - p * kPanelRows};
  }
  [[nodiscard]] i64 pieces() const { return (shape_.block_rows + shape_.piece_rows - 1) / shape_.piece_rows; }
  [[nodiscard]] bool few_rows() const { return shape_.row_lanes > 0; }
  [[nodiscard]] i64 heads() const { return call_.batch * call_.kv_heads; }
  [[nodiscard]] i64 group() const { return call_.q_heads / call_.kv_heads; }
  [[nodiscard]] ForwardScratch<kWord> scratch(int worker) const {
    Arena arena(workspace_ + scratch_ * worker);
    return {arena, call_, shape_};
  }
  [[nodiscard]] float* partial(const Block& block, i64 row, i64 split) const {
    const i64 head = block.batch * call_.kv_heads + block.kv_head;
    return partials_ + ((head * shape_.max_rows + row) * shape_.key_splits + split) * partial_floats(call_);
  }

  /// One block of rows against one part of the keys.
  void attend_block(i64 index, int worker) {
    const i64 split = index / (heads() / shape_.heads_a_task) % shape_.key_splits;
    const Block block = this->block(index, shape_.key_splits, shape_.heads_a_task);
    if (block.rows <= 0) return;
    const Context context{call_, call_.sequences[block.batch], block.batch};
    ForwardScratch<kWord> my = scratch(worker);
    [[maybe_unused]] const Tiles tiles;
    [[maybe_unused]] const FlushToZero flush;
    const i64 panels = shape_.heads_a_task > 1 ? shape_.heads_a_task : (block.rows + kPanelRows - 1) / kPanelRows;
    for (i64 p = 0; p < panels; ++p) {
      const Block part = panel_of(block, p);
      set_rows(my.panels[p], context,
               {group(), part.kv_head * group(), part.first_row + part.rows, math::larger(shape_.row_lanes, i64{1})},
               part.first_row);
      if (!few_rows())
        pack_panel<kWord>(my.q + p * my.q_floats, my.rows, my.bad, my.panels[p], context, call_.q, call_.head_dim,
                          context.fold());
    }
    const i64 scores = (few_rows() ? panels * kJoinedKeys : kStripKeys<kWord>)*kPanelRows;
    for (i64 x = 0; x < scores; x += kWidth) store(my.s + x, V{});  // lanes that no product reaches

    Interval keys = context.sequence.band.keys_of_rows({my.panels[0].queries.begin, my.panels[panels - 1].queries.end});
    keys.begin = math::larger(keys.begin, split * shape_.keys_per_split);
    keys.end = math::smaller(keys.end, (split + 1) * shape_.keys_per_split);
    if (!can_stay(block, keys) || !attend_keys(my, context, block, panels, keys, true))
      attend_keys(my, context, block, panels, keys, false);
    for (i64 p = 0; p < panels; ++p) store_panel(my, p, context, panel_of(block, p), split);
  }

  /// All panels of a task against its keys, which are read in place or packed.  False where, in place, O is not finite.
  bool attend_keys(ForwardScratch<kWord> my, const Context& context, const Block& block, i64 panels, Interval keys,
                   bool in_place) {
    for (i64 x = 0; x < panels * my.o_floats; x += kWidth) store(my.o + x, V{});
    for (i64 x = 0; x < panels * kPanelRows; ++x) {
      my.reference[x] = -kInfinity;
      my.sum_of_p[x] = 0.0F;
    }
    for (i64 p = 0; p < panels && few_rows(); ++p) pack_few_rows(my, p, context);
    const i64 step = few_rows() ? kJoinedKeys : packed_keys(), first = few_rows() ? kJoinedKeys : kForwardKeys;
    for (i64 j = keys.begin / first * first, end = j; j < keys.end; j = end) {
      end = math::smaller((j / step + 1) * step, keys.end);  // the same cuts wherever a task's keys begin
      const Interval tile{j, end};
      if (few_rows()) {
        // Heads whose keys alternate in memory are read together.
        const bool joined = in_place && call_.k.head < call_.k.row && call_.v.head < call_.v.row;
        const i64 together = joined ? heads_in_l1(my) : 1;
        for (i64 h = 0; h < panels; h += together)
          attend_few(my, {h, math::smaller(h + together, panels)}, context, tile, block.kv_head, in_place);
        continue;
      }
      if (in_place) {
        point_to(my.k, call_.k, context, tile, block.kv_head);
        point_to(my.v, call_.v, context, tile, block.kv_head);
      } else {
        my.k.pack(context, call_.k, tile, block.kv_head);
        my.v.pack(context, call_.v, tile, block.kv_head);
        my.v.clear_bad(tile.end - tile.begin);
      }
      my.v_columns.take(my.v, tile.end - tile.begin);
      for (i64 p = 0; p < panels; ++p) attend(my, {p, panels}, context, tile, block.kv_head);
    }
    if (few_rows() && in_pairs(call_.type, call_.head_dim_v)) {
      for (i64 x = 0; x < panels * my.o_floats; x += 2 * kWidth) unpair_columns(my.o + x);
    }
    V taint{};  // 0·x is NaN where x is not finite
    for (i64 x = 0; x < panels * my.o_floats && in_place; x += kWidth) taint += load(my.o + x) * 0.0F;
    return !any(taint != V{});
  }

  [[nodiscard]] bool has_entries() const { return call_.mask.data != nullptr || call_.bias.data != nullptr; }

  /// Whether S needs nothing but its softmax where a strip is full.
  [[nodiscard]] bool plain() const {
    return kWord == Word::kFloat && !has_entries() && !(call_.softcap > 0) && !call_.alibi &&
           call_.keep_threshold == 65536;
  }

  /// More at a time with a mask or bias, whose rows are then read in longer pieces.
  [[nodiscard]] i64 packed_keys() const {
    return kWord == Word::kPair || has_entries() ? kPackedKeys<kWord> : kForwardKeys;
  }

  /// Whether keys and values are multiplied in the caller's memory: where the rows of the block share a vector each is
  /// read once, and packing would cost more than it saves.  Values that are not finite show in O.
  [[nodiscard]] bool can_stay(const Block& block, Interval keys) const {
    if (few_rows()) return call_.head_dim >= kWidth && call_.head_dim_v >= kWidth;
    constexpr i64 kStep = kDepthStep<kWord> * kPerWord<kWord>;
    return kWord == Word::kPair && (keys.end | call_.head_dim | call_.head_dim_v) % kStep == 0 &&
           block.rows <= kWidth && (call_.k.row | call_.v.row) % i64{sizeof(float)} == 0;
  }

  void point_to(PackedRows<kWord>& rows, const RowView& view, const Context& context, Interval keys, i64 head) const {
    rows.data = reinterpret_cast<float*>(const_cast<char*>(context.kv_row(view, keys.begin, head)));
    rows.stride = view.row / i64{sizeof(float)};
    for (i64 j = keys.begin; j < keys.end; ++j) fetch_row(context.kv_row(view, j, head), call_.type, rows.dim);
  }

  /// Heads whose q leaves L1 room for what is read.
  [[nodiscard]] i64 heads_in_l1(const ForwardScratch<kWord>& my) const {
    const i64 words = in_pairs(call_.type, call_.head_dim) ? my.q_floats / 2 : my.q_floats;
    constexpr i64 kHalfOfL1 = 4096;  // words, of a small one
    return math::larger(kHalfOfL1 / words, i64{1});
  }

  void pack_few_rows(ForwardScratch<kWord>& my, i64 p, const Context& context) const {
    const RowVectors vectors(call_.head_dim);
    const Panel& panel = my.panels[p];
    float* q = my.q + p * my.q_floats;
    for (i64 x = 0; x < my.q_floats; x += kWidth) store(q + x, V{});
    for (i64 lane = 0; lane < panel.lanes; lane += panel.parts, q += vectors.floats) {
      if (panel.query[lane] >= context.sequence.band.seqlen_q) continue;
      const char* row = context.q_row(call_.q, panel.query[lane], panel.head[lane]);
      if (in_pairs(call_.type, vectors.dim)) {
        pair_row(q, row, vectors.dim, vectors.dim / 2);
        continue;
      }
      widen_row(my.rows, row, call_.type, vectors.dim, vectors.floats);
      vectors.split(q, my.rows, context.fold());
    }
  }

  /// Keys or values of some heads of a task for its few rows.
  [[nodiscard]] FewRows few_rows_of(const ForwardScratch<kWord>& my, const RowView& view, i64 dim,
                                    const Context& context, Interval heads, Interval keys, i64 first_head) const {
    const i64 count = heads.end - heads.begin, key_bytes = count * dim * bytes(call_.type);
    const i64 ahead = count > 1 ? 8192 : 16384;  // bytes to prefetch; more for one head, whose rows lie apart
    return {context.kv_row(view, keys.begin, first_head + heads.begin),
            view.row,
            view.head,
            call_.type,
            in_pairs(call_.type, dim),
            context.fold(),
            RowVectors(dim),
            (ahead + key_bytes - 1) / key_bytes * view.row,
            keys.end - keys.begin,
            count,
            my.s + heads.begin * kJoinedKeys * kPanelRows,
            nullptr};
  }

  /// Few rows of some heads against some keys, in place, or of one head whose values are copied without those that are
  /// not finite, and keys if they fill no vector.  The same products in the same order: a hidden NaN changes no bit of
  /// other rows.
  void attend_few(ForwardScratch<kWord>& my, Interval heads, const Context& context, Interval keys, i64 first_head,
                  bool in_place) {
    const Panel& first = my.panels[heads.begin];
    const math::TileState state = context.sequence.band.tile(first.queries, keys);
    if (state == math::TileState::kHidden) return;
    FewRows k = few_rows_of(my, call_.k, call_.head_dim, context, heads, keys, first_head);
    FewRows v = few_rows_of(my, call_.v, call_.head_dim_v, context, heads, keys, first_head);
    const auto take = [&](FewRows& few, PackedRows<kWord>& rows, const RowView& view) {
      rows.pack(context, view, keys, first_head + heads.begin);  // and finds what is not finite
      if (rows.dim >= kWidth) {
        rows.copy(context, view, keys, first_head + heads.begin);
      } else {
        few.type = Element::kFloat32;
      }
      few.data = reinterpret_cast<const char*>(rows.data);
      few.row = rows.stride * i64{sizeof(float)};
      few.ahead = 0;
    };
    if (!in_place) {
      take(v, my.v, call_.v);
      my.v.clear_bad(keys.end - keys.begin);
      if (call_.head_dim < kWidth) take(k, my.k, call_.k);
    }
    k.rows = my.q + heads.begin * my.q_floats;
    v.rows = my.o + heads.begin * my.o_floats;
    with_rows(kWidth / first.parts, k, [&]<int kRows, Word kOf, Element kType>() { score_few<kRows, kOf, kType>(k); });
    for (i64 h = heads.begin; h < heads.end; ++h) {
      const Panel& panel = my.panels[h];
      const Tile s{my.s + h * kJoinedKeys * kPanelRows, kPanelRows, keys};
      if (call_.mask.data != nullptr) read_mask(my.mask, panel, context, keys);
      alignas(64) float rescale[kPanelRows] = {};
      float* o = my.o + h * my.o_floats;
      if (make_weights(my, h, context, s, state, my.mask, nullptr, rescale)) {
        for (i64 lane = 0; lane < panel.lanes; lane += panel.parts) {
          float* row = o + lane / panel.parts * v.vectors.floats;
          for (i64 x = 0; x < v.vectors.floats; x += kWidth) store(row + x, load(row + x) * rescale[lane]);
        }
      }
      if (!in_place && my.v.any_bad) {
        add_bad_values(o, s, my.v.bad, panel, context, first_head + h, [&](i64 c, i64 lane) {
          return lane / panel.parts * v.vectors.floats + (v.pairs ? place_in_pairs(c) : v.vectors.at(c));
        });
      }
    }
    with_rows(kWidth / first.parts, v,
              [&]<int kRows, Word kOf, Element kType>() { add_values_of_few<kRows, kOf, kType>(v); });
  }

  /// S of a strip becomes P.  True where O has to be multiplied by `rescale`.
  bool make_weights(ForwardScratch<kWord>& my, i64 p, const Context& context, const Tile& s, math::TileState state,
                    const float* mask, float* pairs, float* rescale) const {
    const Panel& panel = my.panels[p];
    const float scale = finish_scores<kWord>(s, panel, context, state, mask, my.extra, nullptr);
    const Tile whole = hide_past_end<kWord>(s);
    const bool dropout = call_.keep_threshold < 65536;
    if (dropout) dropout_factors(my.extra, panel, context, whole.keys);
    const SoftmaxOf of{scale,   my.reference + p * kPanelRows, my.sum_of_p + p * kPanelRows,
                       rescale, dropout ? my.extra : nullptr,  pairs};
    const bool floats = kWord == Word::kFloat || my.v.any_bad;
    return with_vectors(panel, [&]<int kVectors>() { return online_softmax<kWord, kVectors>(whole, of, floats); });
  }

  /// The first of some panels against the packed keys.
  void attend(ForwardScratch<kWord>& my, Interval panels, const Context& context, Interval packed, i64 kv_head) {
    const i64 p = panels.begin;
    const Panel& panel = my.panels[p];
    const Interval seen = context.sequence.band.keys_of_rows(panel.queries);
    const Interval keys{math::larger(packed.begin, seen.begin / kKeyStep<kWord> * kKeyStep<kWord>),
                        math::smaller(packed.end, seen.end)};
    float* o = my.o + p * my.o_floats;
    i64 first = keys.begin;  // of the keys whose P waits to be multiplied
    const auto add_values = [&](i64 end) {
      const float* weights = kWord == Word::kPair ? my.pairs + (first - keys.begin) / 2 * kPanelRows : my.s;
      if (first < end)
        product_of_panel<kWord, PackedColumns<kWord>::kLayout, Init::kAdd>(  // O += Vᵀ P
            panel,
            {my.v_columns.at(first - packed.begin), my.v_columns.stride, weights, kPanelRows, o, kPanelRows,
             words_of<kWord>(end - first)},
            call_.head_dim_v);
      first = end;
    };
    MaskWords<kMaskKeys<kWord>> masks{my.mask, panel, context, keys};
    // Prefetches, while keys [from, to) are multiplied, their share of the entries after this span of keys.
    const auto fetch = [&](const EntryView& view, i64 entry_bytes, i64 span, i64 from, i64 to)
        __attribute__((always_inline)) {
      const i64 begin = from - (from - keys.begin) % span, end = math::smaller(begin + span, keys.end);
      const bool last = end == keys.end;
      const i64 next = last ? keys.begin : end, share = end - begin;
      if (!last || p + 1 < panels.end)
        fetch_entries(my.panels[p + last], context, view, entry_bytes, {next, next + span},
                      {(from - begin) * kPanelRows / share, (to - begin) * kPanelRows / share});
    };
    for (i64 j = keys.begin; j < keys.end; j += kStripKeys<kWord>) {
      const Interval strip{j, math::smaller(j + kStripKeys<kWord>, keys.end)};
      const math::TileState state = context.sequence.band.tile(panel.queries, strip);
      if (state == math::TileState::kHidden || (call_.mask.data != nullptr && !masks.shows(strip))) {
        add_values(j);
        first = strip.end;
        continue;
      }
      const Tile s{my.s, kPanelRows, strip};
      const auto product_from = [&](i64 r) -> ProductArgs {  // S = K Qᵀ
        return {my.k.row(j + r - packed.begin),
                my.k.stride,
                my.q + p * my.q_floats,
                kPanelRows,
                s.row(r),
                kPanelRows,
                my.k.words};
      };
      const bool weighed = plain() && state == math::TileState::kFull && with_vectors(panel, [&]<int kVectors>() {
                             return weigh_product<kVectors>(product_from(0), s.rows(), my.reference + p * kPanelRows,
                                                            my.sum_of_p + p * kPanelRows);
                           });
      const i64 slice = has_entries() ? kSlice<kWord> : s.rows();
      for (i64 r = 0; r < s.rows() && !weighed; r += slice) {
        const i64 to = j + r + slice;
        if (call_.mask.data != nullptr) fetch(call_.mask, 1, kMaskKeys<kWord>, j + r, to);
        if (call_.bias.data != nullptr) fetch(call_.bias, bytes(call_.bias_type), kStripKeys<kWord>, j + r, to);
        product_of_panel<kWord, ALayout::kRowMajor, Init::kZero>(panel, product_from(r),
                                                                 math::smaller(slice, s.rows() - r));
      }
      alignas(64) float rescale[kPanelRows] = {};  // 0 for the vectors that softmax does not make
      if (!weighed && make_weights(my, p, context, s, state, masks.of(strip),
                                   my.pairs + (j - keys.begin) / 2 * kPanelRows, rescale)) {
        add_values(j);
        for_each_vector({o, kPanelRows, {0, call_.head_dim_v}},
                        [&](i64 /*r*/, int lane, float* at) { store(at, load(at) * load(rescale + lane)); });
      }
      if (my.v.any_bad) {
        add_bad_values(o, s, my.v.bad + (j - packed.begin), panel, context, kv_head,
                       [](i64 c, i64 lane) { return c * kPanelRows + lane; });
      }
      if (kWord == Word::kFloat) add_values(strip.end);
    }
    add_values(keys.end);
  }

  void store_panel(ForwardScratch<kWord>& my, i64 p, const Context& context, const Block& block, i64 split) {
    const Panel& panel = my.panels[p];
    const float* o = my.o + p * my.o_floats;
    const RowVectors vectors(call_.head_dim_v);
    const i64 stride = vectors.floats, parts = panel.parts;
    if (!few_rows()) transpose_words<Word::kFloat>(my.rows, stride, o, kPanelRows, stride, kPanelRows, 1.0F);
    for (i64 lane = 0; lane < panel.lanes; lane += parts) {
      float* row = my.rows + lane * stride;
      if (few_rows()) vectors.join(row, o + lane / parts * stride);
      const float reference = my.reference[p * kPanelRows + lane], sum_of_p = my.sum_of_p[p * kPanelRows + lane];
      if (shape_.key_splits == 1) {
        write_row(context, panel.query[lane], panel.head[lane], reference, sum_of_p, row);
      } else {
        float* part = partial(block, block.first_row + lane / parts, split);
        for (i64 c = 0; c < call_.head_dim_v; ++c) part[c] = row[c];
        part[call_.head_dim_v] = reference;
        part[call_.head_dim_v + 1] = sum_of_p;
      }
    }
  }

  /// Combines the partial results of the splits of each row, in their order.
  void combine_block(i64 index, int worker) {
    const Block block = this->block(index, 1, 1);
    const Context context{call_, call_.sequences[block.batch], block.batch};
    const ForwardScratch<kWord> my = scratch(worker);
    const i64 dim = call_.head_dim_v;
    for (i64 r = block.first_row; r < block.first_row + block.rows; ++r) {
      float reference = -kInfinity, sum_of_p = 0.0F;
      for (i64 split = 0; split < shape_.key_splits; ++split) {
        const float top = partial(block, r, split)[dim];
        reference = top > reference ? top : reference;
      }
      for (i64 c = 0; c < dim; ++c) my.rows[c] = 0.0F;
      for (i64 split = 0; split < shape_.key_splits; ++split) {
        const float* part = partial(block, r, split);
        if (part[dim + 1] == 0.0F) continue;
        const float factor = __builtin_exp2f(part[dim] - reference);
        sum_of_p += part[dim + 1] * factor;
        for (i64 c = 0; c < dim; ++c) my.rows[c] += part[c] * factor;
      }
      write_row(context, r / group(), block.kv_head * group() + r % group(), reference, sum_of_p, my.rows);
    }
  }

  const FlashCall& call_;
  const ForwardShape& shape_;
  i64 scratch_;           // bytes a worker
  std::byte* workspace_;  // of all workers
  float* partials_;       // [head][row][split][partial_floats]
  std::size_t bytes_;
};

}  // namespace fovea::cpu::FOVEA_ISA
