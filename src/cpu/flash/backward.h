#pragma once

#include <sched.h>

#include "cpu/flash/gradient_tile.h"

// FlashAttention's backward (2205.14135, algorithm 4), parallel over the keys as in 2307.08691: a task owns a block of
// keys with its dk and dv, and walks the row groups.  dq is added up without atomics, always in the order of the key
// blocks: each row group has a ticket that says how many blocks have added, so the bits never depend on threads.
namespace fovea::cpu::FOVEA_ISA {

/// Floats of dq of one row group.
template <Word kWord>
inline i64 dq_floats(const FlashCall& call) {
  return kGroupRows * whole(call.head_dim, kWidth);
}

template <Word kWord>
struct BackwardScratch {
  RowGroup<kWord> rows;
  PackedRows<kWord> k, v;     // of block_keys keys
  PackedRows<kWord> clean_k;  // k with rows that are not finite as 0
  PackedColumns<kWord> k_columns;
  float *dk, *dv;   // [key][padded dim]
  float* dq;        // [panel][dim][lane]
  float* tile_sum;  // [kBiasKeys][kGroupRows]: of dbias, or room to turn its tiles
  double* dslopes;  // [head of the group]

  BackwardScratch(Arena& arena, const FlashCall& call, const BackwardShape& shape)
      : rows(arena, call),
        k(arena, shape.block_keys, call.head_dim),
        v(arena, shape.block_keys, call.head_dim_v),
        clean_k(arena, shape.block_keys, call.head_dim),
        k_columns(arena, shape.block_keys, call.head_dim) {
    dk = arena.take<float>(shape.block_keys * rows.q.padded);
    dv = arena.take<float>(shape.block_keys * rows.dout.padded);
    dq = arena.take<float>(dq_floats<kWord>(call));
    tile_sum = arena.take<float>(kBiasKeys * kGroupRows);
    dslopes = arena.take<double>(call.q_heads / call.kv_heads);
  }
};

/// Waits until `ticket` reaches `turn`.  The tasks that it waits for were claimed earlier, so they run or have run.
inline void await_turn(const std::int32_t* ticket, std::int32_t turn) {
  while (__atomic_load_n(ticket, __ATOMIC_ACQUIRE) != turn) sched_yield();
}

template <Word kWord>
class Backward {
 public:
  Backward(const FlashCall& call, const BackwardShape& shape, std::byte* workspace)
      : call_(call), shape_(shape), scratch_(Arena::bytes_of<BackwardScratch<kWord>>(call, shape)) {
    Arena arena(workspace);
    const i64 groups = call.kv_heads * shape.total_groups, rows = groups * kGroupRows;
    workspace_ = arena.take<std::byte>(scratch_ * shape.workers);
    dq_ = arena.take<float>(groups * dq_floats<kWord>(call));
    stats_ = {arena.take<float>(rows), arena.take<float>(rows), arena.take<float>(rows)};
    dslopes_ = arena.take<double>(call.alibi ? call.batch * call.q_heads * shape.blocks : 0);
    if (shape.bias_sharers > 1) bias_panels_ = shape.max_groups * shape.block_keys / kKeyTile * kGroupRows / kPanelRows;
    bias_sums_ = arena.take<float>(bias_panels_ * kKeyTile * kPanelRows);
    tickets_ = arena.take<std::int32_t>(groups + bias_panels_);
    bytes_ = arena.used();
  }

  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }

  void run() {
    const i64 heads = call_.batch * call_.kv_heads;
    for (i64 t = 0; t < call_.kv_heads * shape_.total_groups + bias_panels_; ++t) tickets_[t] = 0;
    each<&Backward::row_statistics>(heads * shape_.max_groups);
    if (takes_bias()) each<&Backward::clear_bias_gradient>(call_.batch * call_.q_heads);
    each<&Backward::key_block>(heads * shape_.blocks);
    if (call_.dslopes.data != nullptr)
      each<&Backward::sum_dslopes>((call_.slopes.per_batch ? call_.batch : 1) * call_.q_heads);
    if (call_.dsink != nullptr) each<&Backward::sum_dsink>(call_.q_heads);
    if (call_.dbias.data != nullptr && !takes_bias()) each<&Backward::bias_block>(bias_tile(0).tiles);
  }

 private:
  template <auto kStep>
  void each(i64 tasks) {
    run_steps<kStep>(*this, tasks, shape_.workers);
  }

  /// A row group of one sequence and one kv head.
  struct Group {
    i64 batch, kv_head, index;
    i64 first_row, rows;  // rows left of the sequence from first_row on, at most kGroupRows
    Interval queries;
  };
  [[nodiscard]] i64 group_size() const { return call_.q_heads / call_.kv_heads; }
  [[nodiscard]] Group group(i64 batch, i64 kv_head, i64 index) const {
    const i64 first_row = index * kGroupRows, left = call_.sequences[batch].q_rows * group_size() - first_row;
    const i64 rows = math::smaller(left, kGroupRows);
    if (rows <= 0) return {batch, kv_head, index, first_row, 0, {0, 0}};
    const Interval queries{first_row / group_size(), (first_row + rows - 1) / group_size() + 1};
    return {batch, kv_head, index, first_row, rows, queries};
  }
  /// A row group of a task's sequence and kv head.  Tasks that share entries of dbias follow each other.
  [[nodiscard]] Group group_of_block(i64 task, i64 index) const {
    const i64 head = task % (call_.batch * call_.kv_heads);
    if (takes_bias() && call_.dbias.batch == 0) return group(head % call_.batch, head / call_.batch, index);
    return group(head / call_.kv_heads, head % call_.kv_heads, index);
  }
  [[nodiscard]] i64 slot(i64 batch, i64 kv_head, i64 index) const {
    return kv_head * shape_.total_groups + call_.sequences[batch].first_group + index;
  }
  [[nodiscard]] RowStats stats(i64 batch, i64 kv_head) const {
    const i64 at = slot(batch, kv_head, 0) * kGroupRows;
    return {stats_.log2_lse + at, stats_.delta + at, stats_.sink + at};
  }
  [[nodiscard]] float* dq_sum(const Group& group) const {
    return dq_ + slot(group.batch, group.kv_head, group.index) * dq_floats<kWord>(call_);
  }
  [[nodiscard]] BackwardScratch<kWord> scratch(int worker) const {
    Arena arena(workspace_ + scratch_ * worker);
    return {arena, call_, shape_};
  }

  /// delta = Σ dout·out − dlse, and lse in units of log2.
  void row_statistics(i64 task, int worker) {
    const Group group = group_of_block(task / shape_.max_groups, task % shape_.max_groups);
    const Context context{call_, call_.sequences[group.batch], group.batch};
    const BackwardScratch<kWord> my = scratch(worker);
    const RowStats stats = this->stats(group.batch, group.kv_head);
    if (context.sequence.band.keys_of_rows(group.queries).empty()) {  // no block of keys will add to its dq
      for (i64 x = 0; x < dq_floats<kWord>(call_); ++x) my.dq[x] = 0.0F;
      store_dq(my, context, group, my.dq);
    }
    const i64 padded = my.rows.dout.padded;
    float *out = my.rows.s, *dout = my.rows.s + padded;
    for (i64 r = group.first_row; r < group.first_row + group.rows; ++r) {
      const i64 i = r / group_size(), head = group.kv_head * group_size() + r % group_size();
      const float lse = i < context.sequence.band.seqlen_q ? *context.statistic(call_.lse, i, head) : -kInfinity;
      stats.log2_lse[r] = lse == -kInfinity ? kInfinity : lse * kLog2E;
      stats.delta[r] = stats.sink[r] = 0.0F;
      if (lse == -kInfinity) continue;
      fetch_row(context.q_row(call_.out, i + kRowsAhead, head), call_.type, call_.head_dim_v);
      fetch_row(context.q_row(call_.dout, i + kRowsAhead, head), call_.type, call_.head_dim_v);
      widen_row(out, context.q_row(call_.out, i, head), call_.type, call_.head_dim_v, padded);
      widen_row(dout, context.q_row(call_.dout, i, head), call_.type, call_.head_dim_v, padded);
      V total{};
      for (i64 c = 0; c < padded; c += kWidth) total += load(out + c) * load(dout + c);
      stats.delta[r] = sum(total) - (call_.dlse.data == nullptr ? 0.0F : *context.statistic(call_.dlse, i, head));
      if (call_.sink != nullptr)
        stats.sink[r] = -stats.delta[r] * __builtin_exp2f(call_.sink[head] * kLog2E - stats.log2_lse[r]);
    }
  }

  /// dk and dv of one block of keys, and its part of dq.
  void key_block(i64 task, int worker) {
    const Group any = group_of_block(task, 0);
    const i64 block = task / (call_.batch * call_.kv_heads), batch = any.batch, kv_head = any.kv_head;
    const Context context{call_, call_.sequences[batch], batch};
    const Sequence& sequence = context.sequence;
    const Interval all{block * shape_.block_keys, math::smaller((block + 1) * shape_.block_keys, sequence.kv_rows)};
    if (all.empty()) return;
    const Interval keys{all.begin, math::larger(all.begin, math::smaller(all.end, sequence.band.seqlen_kv))};
    BackwardScratch<kWord> my = scratch(worker);
    [[maybe_unused]] const Tiles tiles;
    [[maybe_unused]] const FlushToZero flush;
    pack_keys(my, context, keys, kv_head);
    const i64 sums = whole(all.end - all.begin, kRowStep<kWord>);
    for (i64 x = 0; x < sums * my.rows.q.padded; ++x) my.dk[x] = 0.0F;
    for (i64 x = 0; x < sums * my.rows.dout.padded; ++x) my.dv[x] = 0.0F;
    for (i64 g = 0; g < group_size(); ++g) my.dslopes[g] = 0.0;

    const Interval rows = sequence.band.rows_of_keys(keys);
    for (i64 g = rows.begin * group_size() / kGroupRows; g * kGroupRows < rows.end * group_size(); ++g) {
      const Group group = this->group(batch, kv_head, g);
      if (sequence.band.tile(group.queries, keys) != math::TileState::kHidden) {
        add_group(my, context, group, keys, task);
      }
    }

    store_keys(my, context, all, kv_head);
    for (i64 g = 0; g < group_size() && call_.alibi; ++g) {
      dslopes_[(batch * call_.q_heads + kv_head * group_size() + g) * shape_.blocks + block] = my.dslopes[g];
    }
  }

  void pack_keys(BackwardScratch<kWord>& my, const Context& context, Interval keys, i64 kv_head) const {
    my.k.pack(context, call_.k, keys, kv_head);
    my.v.pack(context, call_.v, keys, kv_head);
    if (my.k.any_bad) {
      my.clean_k.pack(context, call_.k, keys, kv_head);
      my.clean_k.clear_bad(keys.end - keys.begin);
    } else {
      my.clean_k = my.k;
    }
    my.k_columns.take(my.clean_k, keys.end - keys.begin);
  }

  void store_keys(BackwardScratch<kWord>& my, const Context& context, Interval keys, i64 kv_head) const {
    for (i64 j = keys.begin; j < keys.end; ++j) {
      float* dk = my.dk + (j - keys.begin) * my.rows.q.padded;
      for (i64 c = 0; c < call_.head_dim; ++c) dk[c] *= call_.scale;
      context.write_row(call_.dk, context.kv_row(call_.dk, j, kv_head), dk, call_.head_dim);
      context.write_row(call_.dv, context.kv_row(call_.dv, j, kv_head), my.dv + (j - keys.begin) * my.rows.dout.padded,
                        call_.head_dim_v);
    }
  }

  [[nodiscard]] float* dq_of(const BackwardScratch<kWord>& my, i64 panel) const {
    return my.dq + panel * (dq_floats<kWord>(call_) / my.rows.kPanels);
  }

  /// A block of keys against one row group: dv += Pᵀ dout, dk += dSᵀ q, and dq's part dS k, which waits for its turn.
  void add_group(BackwardScratch<kWord>& my, const Context& context, const Group& group, Interval keys, i64 task) {
    my.rows.load_rows(context, {group_size(), group.kv_head * group_size(), group.first_row + group.rows},
                      group.first_row, stats(group.batch, group.kv_head));
    const i64 floats = dq_floats<kWord>(call_);
    for (i64 x = 0; x < floats; ++x) my.dq[x] = 0.0F;
    for (i64 j = keys.begin; j < keys.end; j += kKeyTile) {
      const Interval tile{j, math::smaller(j + kKeyTile, keys.end)};
      if (context.sequence.band.tile(group.queries, tile) != math::TileState::kHidden)
        add_tile(my, context, group, tile, j - keys.begin, task);
    }
    std::int32_t* ticket = tickets_ + slot(group.batch, group.kv_head, group.index);
    const Interval seen = context.sequence.band.keys_of_rows(group.queries);
    const i64 block = task / (call_.batch * call_.kv_heads);
    const auto turn = static_cast<std::int32_t>(block - seen.begin / shape_.block_keys);
    float* sum = dq_sum(group);
    await_turn(ticket, turn);
    if ((block + 1) * shape_.block_keys >= seen.end) {  // the last that adds
      for (i64 x = 0; x < floats && turn > 0; x += kWidth) store(my.dq + x, load(sum + x) + load(my.dq + x));
      return store_dq(my, context, group, my.dq);
    }
    for (i64 x = 0; x < floats; x += kWidth)
      store(sum + x, turn == 0 ? load(my.dq + x) : load(sum + x) + load(my.dq + x));
    __atomic_store_n(ticket, turn + 1, __ATOMIC_RELEASE);
  }

  /// The same of one tile, whose keys are rows of k and v from `offset` on.
  void add_tile(BackwardScratch<kWord>& my, const Context& context, const Group& group, Interval keys, i64 offset,
                i64 task) {
    RowGroup<kWord>& rows = my.rows;
    const i64 count = keys.end - keys.begin;
    const bool any_bad = rows.any_bad || my.k.any_bad,
               floats = kWord == Word::kFloat || any_bad || call_.alibi || takes_bias();
    Interval seen[RowGroup<kWord>::kPanels];  // of the tile's keys
    for (i64 p = 0; p < rows.kPanels; ++p) {
      const Tile ds = rows.tile_of(rows.ds, p, keys);
      const auto [first, end] = seen[p] = rows.recompute(p, context, keys, my.k, my.v, offset, floats);
      if (takes_bias()) add_to_bias(my, context, group, task, p, ds);
      if (seen[p].empty()) continue;
      if (call_.alibi) add_slope_gradient(my, context, ds, rows.panels[p]);
      if (call_.softcap > 0 && floats) {
        const Tile tanhs = rows.tile_of(rows.tanhs, p, keys);
        for_each_vector(ds, [&](i64 r, int lane, float* x) { store(x, before_softcap(load(x), tanhs.row(r) + lane)); });
      }
      const Tile over_keys = kWord == Word::kPair ? Tile{rows.ds_over_keys, kPanelRows, keys} : ds;
      product_of_panel<kWord, PackedColumns<kWord>::kLayout, Init::kAdd>(  // dqᵀ += Kᵀ dSᵀ
          rows.panels[p],
          {my.k_columns.at(offset + first), my.k_columns.stride, over_keys.row(first / kPerWord<kWord>),
           over_keys.stride, dq_of(my, p), kPanelRows, words_of<kWord>(end - first)},
          call_.head_dim);
    }
    // The panels from the first to the last that see some keys.
    const auto panels_of = [&seen](i64 key) {
      Interval panels{0, 0};
      for (i64 p = 0; p < RowGroup<kWord>::kPanels; ++p) {
        if (seen[p].begin <= key && key < seen[p].end) panels = {panels.empty() ? p : panels.begin, p + 1};
      }
      return panels;
    };
    for (i64 first = 0, end = 0; first < count; first = end) {
      const Interval panels = panels_of(first);
      for (end = first; end < count; end += rows.kStrip) {
        const Interval others = panels_of(end);
        if (others.begin != panels.begin || others.end != panels.end) break;
      }
      end = math::smaller(end, count);
      if (!panels.empty()) add_to_keys(my, panels, first, end - first, offset);
    }
    if (any_bad) add_bad_rows(my, context, keys, offset);
  }

  /// dv += Pᵀ dout and dk += dSᵀ q of `count` keys of a tile, from `first` on, and some panels.
  void add_to_keys(BackwardScratch<kWord>& my, Interval panels, i64 first, i64 count, i64 offset) const {
    const RowGroup<kWord>& rows = my.rows;
    constexpr i64 kStep = kDepthStep<kWord> * kPerWord<kWord>;  // the panels' lanes, as whole words' depth
    const i64 lane = panels.begin * kPanelRows / kStep * kStep, last = panels.end - 1;
    const i64 depth = words_of<kWord>(last * kPanelRows + rows.panels[last].lanes - lane);
    const auto add = [&](const float* words, const PackedGroup<kWord>& group, float* to) {
      product_wide<kWord, ALayout::kRowMajor, Init::kAdd>(
          {words + first * rows.kWordStride + lane / kPerWord<kWord>, rows.kWordStride, group.from_row(lane),
           group.padded, to + (offset + first) * group.padded, group.padded, depth},
          count, group.padded / kWidth);
    };
    add(rows.p_words, rows.dout, my.dv);
    add(rows.ds_words, rows.q, my.dk);
  }

  /// Adds what products left out, which saw rows of q, k and dout that are not finite as 0: visible entries only.
  void add_bad_rows(BackwardScratch<kWord>& my, const Context& context, Interval keys, i64 offset) {
    const RowGroup<kWord>& rows = my.rows;
    const i64 size = bytes(call_.type);
    for (i64 x = 0; x < kGroupRows; ++x) {
      const Panel& panel = rows.panels[x / kPanelRows];
      const i64 lane = x % kPanelRows;
      if (lane >= panel.lanes || !(rows.q.bad[x] || rows.dout.bad[x] || my.k.any_bad)) continue;
      const i64 i = panel.query[lane], head = panel.head[lane];
      for (i64 j = keys.begin; j < keys.end; ++j) {
        const i64 r = j - keys.begin;
        if (!(rows.q.bad[x] || rows.dout.bad[x] || my.k.bad[offset + r]) || !context.visible(i, j, head)) continue;
        const float weight = rows.s[r * kGroupRows + x], ds = rows.ds[r * kGroupRows + x];
        const char *q = context.q_row(call_.q, i, head), *dout = context.q_row(call_.dout, i, head);
        const char* k = context.kv_row(call_.k, j, head / group_size());
        for (i64 c = 0; rows.dout.bad[x] && c < call_.head_dim_v; ++c) {
          my.dv[(offset + r) * rows.dout.padded + c] += weight * widen(dout + c * size, call_.type);
        }
        for (i64 c = 0; c < call_.head_dim; ++c) {
          if (rows.q.bad[x]) my.dk[(offset + r) * rows.q.padded + c] += ds * widen(q + c * size, call_.type);
          if (my.k.bad[offset + r]) {
            dq_of(my, x / kPanelRows)[c * kPanelRows + lane] += ds * widen(k + c * size, call_.type);
          }
        }
      }
    }
  }

  void add_slope_gradient(BackwardScratch<kWord>& my, const Context& context, const Tile& ds, const Panel& panel) {
    const Distance distance(panel, context, ds.keys);
    alignas(64) float total[kPanelRows] = {};
    for_each_vector(ds, [&](i64 r, int lane, const float* x) {
      store(total + lane, load(total + lane) - load(x) * distance.at(r, lane));
    });
    for (i64 lane = 0; lane < panel.lanes; ++lane)
      my.dslopes[panel.head[lane] % group_size()] += static_cast<double>(total[lane]);
  }

  /// Writes dq of a row group, [panel][dim][lane].
  void store_dq(const BackwardScratch<kWord>& my, const Context& context, const Group& group, const float* dq) {
    const i64 padded = my.rows.q.padded, floats = dq_floats<kWord>(call_) / my.rows.kPanels;
    for (i64 p = 0; p * kPanelRows < group.rows; ++p) {
      transpose_words<Word::kFloat>(my.rows.q.rows, padded, dq + p * floats, kPanelRows, padded, kPanelRows,
                                    call_.scale);
      for (i64 lane = 0; lane < math::smaller(kPanelRows, group.rows - p * kPanelRows); ++lane) {
        const i64 r = group.first_row + p * kPanelRows + lane;
        const char* to = context.q_row(call_.dq, r / group_size(), group.kv_head * group_size() + r % group_size());
        context.write_row(call_.dq, to, my.rows.q.rows + lane * padded, call_.head_dim);
      }
    }
  }

  void sum_dslopes(i64 task, int /*worker*/) {
    const i64 batch = task / call_.q_heads, head = task % call_.q_heads;  // batch 0 is all, where slopes are per head
    double total = 0.0;
    for (i64 b = batch; b < (call_.slopes.per_batch ? batch + 1 : call_.batch); ++b) {
      const double* parts = dslopes_ + (b * call_.q_heads + head) * shape_.blocks;
      const i64 blocks = (call_.sequences[b].kv_rows + shape_.block_keys - 1) / shape_.block_keys;
      for (i64 block = 0; block < blocks; ++block) total += parts[block];
    }
    call_.dslopes.data[batch * call_.dslopes.batch + head] = static_cast<float>(total);
  }

  void sum_dsink(i64 head, int /*worker*/) {
    double total = 0.0;
    for (i64 b = 0; b < call_.batch; ++b) {
      const RowStats stats = this->stats(b, head / group_size());
      for (i64 i = 0; i < call_.sequences[b].q_rows; ++i)
        total += static_cast<double>(stats.sink[i * group_size() + head % group_size()]);
    }
    call_.dsink[head] = static_cast<float>(total);
  }

  // ---- dbias of entries that only sequences or heads share: dS, which they add up in turns, in the order of tasks

  [[nodiscard]] bool takes_bias() const { return shape_.bias_sharers > 0 && call_.dbias.data != nullptr; }

  /// Zeros, unless rows of the first sequence that shares them see all keys: then every entry is written.
  void clear_bias_gradient(i64 task, int /*worker*/) {
    const i64 batch = task / call_.q_heads, head = task % call_.q_heads;
    if ((call_.dbias.batch == 0 && batch > 0) || (call_.dbias.head == 0 && head > 0)) return;
    const Context context{call_, call_.sequences[batch], batch};
    if (context.sequence.band.tile({0, shape_.max_queries}, {0, shape_.max_keys}) == math::TileState::kFull) return;
    for (i64 i = 0; i < shape_.max_queries; ++i) {
      char* to = const_cast<char*>(context.entry(call_.dbias, i, 0, head));
      for (i64 b = 0; b < shape_.max_keys * bytes(call_.bias_type); ++b) to[b] = 0;
    }
  }

  /// Writes a tile, [key][lane], by way of room for [lane][key], and adds up rows that heads of a group share.
  void store_bias_gradient(const Context& context, const Tile& tile, i64 lanes, const RowMap& map, i64 first_row,
                           float* room) const {
    const i64 count = tile.rows(), rows = math::smaller(lanes, map.rows - first_row);
    transpose_words<Word::kFloat>(room, kKeyTile, tile.data, tile.stride, whole(count, kWidth), lanes, 1.0F);
    for (i64 lane = 0, i = first_row / map.group, head = first_row % map.group; lane < rows; ++lane, ++head) {
      if (head == map.group) ++i, head = 0;
      float* row = room + lane * kKeyTile;
      const bool shared = call_.dbias.head == 0 && head > 0;
      for (i64 x = 0; shared && x < kKeyTile; x += kWidth) store(row + x, load(row + x) + load(row + x - kKeyTile));
      char* to = const_cast<char*>(context.entry(call_.dbias, i, tile.keys.begin, map.first_head + head));
      narrow_row(to, row, call_.bias_type, count);
    }
  }

  /// Adds a panel's part of a tile to the sum of the tasks that share its entries; the last of them writes it.  All
  /// blocks of dbias use the same sums, one after the other.
  void add_to_bias(const BackwardScratch<kWord>& my, const Context& context, const Group& group, i64 task, i64 p,
                   const Tile& ds) const {
    const i64 group_heads = group_size(), first_row = group.first_row + p * kPanelRows;
    RowMap rows{group_heads, group.kv_head * group_heads, group.first_row + group.rows};
    if (bias_panels_ == 0) return store_bias_gradient(context, ds, kPanelRows, rows, first_row, my.tile_sum);
    const i64 heads = call_.batch * call_.kv_heads, first = task - task % shape_.bias_sharers;
    const auto adds = [&](i64 other) {  // to this sum; not where it sees nothing
      const Group its = group_of_block(other, group.index);
      const i64 key = ds.keys.begin + (other / heads - task / heads) * shape_.block_keys;
      return call_.sequences[its.batch].band.tile(its.queries, {key, key + kKeyTile}) != math::TileState::kHidden;
    };
    i64 before = task - 1, after = task + 1;
    while (before >= 0 && !adds(before)) --before;
    while (after < first + shape_.bias_sharers && !adds(after)) ++after;
    const Interval keys{ds.keys.begin, math::smaller(ds.keys.begin + kKeyTile, shape_.max_keys)};
    const i64 tile = (group.index * shape_.block_keys + keys.begin % shape_.block_keys) / kKeyTile;
    const i64 at = tile * my.rows.kPanels + p;
    const Tile sum{bias_sums_ + at * kKeyTile * kPanelRows, kPanelRows, keys};
    std::int32_t* ticket = tickets_ + call_.kv_heads * shape_.total_groups + at;
    await_turn(ticket, static_cast<std::int32_t>(before + 1));
    for_each_vector(sum, [&](i64 r, int lane, float* to) {
      const V x = r < ds.rows() ? load(ds.row(r) + lane) : V{};
      store(to, before < first ? x : load(to) + x);
    });
    if (after == first + shape_.bias_sharers) {
      rows.rows = shape_.max_queries * group_heads;  // of the longest sequence
      store_bias_gradient(context, sum, kPanelRows, rows, first_row, my.tile_sum);
    }
    __atomic_store_n(ticket, static_cast<std::int32_t>(task + 1), __ATOMIC_RELEASE);
  }

  // ---- else each task owns a tile of it (one entry long where broadcast) and recomputes and sums its part of dS

  static constexpr i64 kTasksAWorker = 4;
  [[nodiscard]] i64 bias_slots() const { return call_.dbias.key != 0 ? kBiasKeys : kKeyTile; }  // keys of a sum
  struct BiasTile {
    Interval batches, heads, rows, keys;
    i64 tiles;  // of dbias
  };
  [[nodiscard]] BiasTile bias_tile(i64 task) const {
    i64 tiles = 1;
    const auto part = [&](bool own, i64 size, i64 step) {
      if (!own) return Interval{0, size};
      const i64 count = math::larger(i64{1}, (size + step - 1) / step), at = task / tiles % count * step;
      tiles *= count;
      return Interval{at, math::smaller(at + step, size)};
    };
    const Interval rows = part(call_.dbias.query != 0, shape_.max_queries, kGroupRows);
    const Interval heads = part(call_.dbias.head != 0, call_.q_heads, 1);
    const Interval batches = part(call_.dbias.batch != 0, call_.batch, 1);
    i64 step = kBiasKeys;  // fewer where workers would have nothing to do
    while (step > kKeyTile && tiles * shape_.max_keys < kTasksAWorker * shape_.workers * step) step -= kKeyTile;
    const Interval keys = part(call_.dbias.key != 0, shape_.max_keys, step);
    return {batches, heads, rows, keys, tiles};
  }

  void bias_block(i64 task, int worker) {
    const auto [batches, heads, rows, keys, count] = bias_tile(task);
    const bool own_row = call_.dbias.query != 0, own_key = call_.dbias.key != 0;
    BackwardScratch<kWord> my = scratch(worker);
    [[maybe_unused]] const Tiles tiles;
    [[maybe_unused]] const FlushToZero flush;
    for (i64 x = 0; x < bias_slots() * kGroupRows; ++x) my.tile_sum[x] = 0.0F;
    for (i64 b = batches.begin; b < batches.end; ++b) {
      for (i64 h = heads.begin; h < heads.end; ++h) {
        for (i64 i = rows.begin; i < rows.end; i += kGroupRows)
          add_bias_gradient(my, b, h, {i, math::smaller(i + kGroupRows, rows.end)}, keys);
      }
    }
    const Context context{call_, call_.sequences[batches.begin], batches.begin};
    for (i64 j = keys.begin; own_row && own_key && j < keys.end; j += kKeyTile) {
      const Interval tile{j, math::smaller(j + kKeyTile, keys.end)};
      const Tile sum{my.tile_sum + (j - keys.begin) * kGroupRows, kGroupRows, tile};
      store_bias_gradient(context, sum, kGroupRows, {1, heads.begin, rows.end}, rows.begin, my.rows.s);
    }
    if (own_row && own_key) return;
    for (i64 i = 0; i < (own_row ? rows.end - rows.begin : 1); ++i) {
      for (i64 j = 0; j < (own_key ? keys.end - keys.begin : 1); ++j) {
        double total = 0.0;
        for (i64 r = own_key ? j : 0; r < (own_key ? j + 1 : bias_slots()); ++r) {
          for (i64 x = own_row ? i : 0; x < (own_row ? i + 1 : kGroupRows); ++x)
            total += static_cast<double>(my.tile_sum[r * kGroupRows + x]);
        }
        char* to = const_cast<char*>(context.entry(call_.dbias, rows.begin + i, keys.begin + j, heads.begin));
        narrow(to, call_.bias_type, static_cast<float>(total));
      }
    }
  }

  /// Adds dS of some rows of one head against keys to the tile sum: entry (i, j) at (j − the first key,
  /// mod bias_slots(), i mod kGroupRows).
  void add_bias_gradient(BackwardScratch<kWord>& my, i64 batch, i64 head, Interval queries, Interval keys) {
    const Context context{call_, call_.sequences[batch], batch};
    const Sequence& sequence = context.sequence;
    const i64 kv_head = head / group_size(), first_key = keys.begin;
    queries.end = math::smaller(queries.end, sequence.q_rows);
    const Interval seen = sequence.band.keys_of_rows(queries);
    keys = {math::larger(keys.begin, seen.begin / kKeyTile * kKeyTile), math::smaller(keys.end, seen.end)};
    if (queries.empty() || keys.empty()) return;
    my.rows.load_rows(context, {1, head, queries.end}, queries.begin, stats(batch, kv_head));
    for (i64 j = keys.begin; j < keys.end; j += kKeyTile) {
      const Interval tile{j, math::smaller(j + kKeyTile, keys.end)};
      my.k.pack(context, call_.k, tile, kv_head);
      my.v.pack(context, call_.v, tile, kv_head);
      for (i64 p = 0; p < my.rows.kPanels; ++p) {
        if (my.rows.recompute(p, context, tile, my.k, my.v, 0, true).empty()) continue;
        const Tile sum = my.rows.tile_of(my.tile_sum + (j - first_key) % bias_slots() * kGroupRows, p, tile);
        for_each_vector(my.rows.tile_of(my.rows.ds, p, tile), [&](i64 r, int lane, const float* x) {
          store(sum.row(r) + lane, load(sum.row(r) + lane) + load(x));
        });
      }
    }
  }

  const FlashCall& call_;
  const BackwardShape& shape_;
  i64 scratch_;            // bytes a worker
  std::byte* workspace_;   // of all workers
  float* dq_;              // [kv head][row group][panel][dim][lane]
  RowStats stats_;         // [kv head][row group][lane]
  std::int32_t* tickets_;  // [kv head][row group], then of sums of dbias
  double* dslopes_;        // [batch][q head][key block]
  i64 bias_panels_ = 0;    // where tasks share dbias
  float* bias_sums_;       // [row group][tile of a block][panel][key][lane]
  std::size_t bytes_;
};

}  // namespace fovea::cpu::FOVEA_ISA
