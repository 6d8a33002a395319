#pragma once

#include "cuda/kernels/hopper/epilogue.cuh"
#include "cuda/kernels/hopper/softmax.cuh"
#include "cuda/kernels/hopper/state.cuh"

// A warpgroup that computes 64 rows: S = Q Kᵀ and O += P V.  The tensor cores always have the scores of one tile and P
// V of the one before; as soon as the scores are done they pass through the softmax, while P V still runs.
namespace fovea::cuda {

template <ForwardSm90Spec S>
struct Consumer {
  using Soft = Softmax<S>;
  using Scores = typename Soft::Scores;
  using Weights = typename Soft::Weights;
  using Out = typename Epilogue<S>::Out;
  using Found = typename Soft::Found;
  using Rules = typename Found::Rules;

  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  const int group;     // of warps: which 64 rows
  u32 n = 0;           // tiles of rows so far
  u32 keys = 0;        // and of keys
  u32 fetched = 0;     // and of these, those computed
  u32 left = 0;        // tiles of rows whose O has been read from Q's place, which was released
  float steep = 0.0F;  // slope over scale
  Interval full{};     // tiles of keys that these 64 rows see whole, where O leaves enough registers to keep it

  static constexpr int kShort = short_n(S);
  static constexpr bool kBeginsWithSlopes = Soft::kBeginsWithSlopes;
  static constexpr bool kEndsEarly = S.turns;     // sums, while the last values are added
  static constexpr int kStride = S.mask ? 0 : 1;  // to the next tile; with a mask the producer says which
  static constexpr bool kKnowsFull = S.head_dim_v <= 192;

  FOVEA_DEVICE int warp_row() const { return group * kGroupRows + warp_id() % 4 * 16; }

  FOVEA_DEVICE void run() {
    if (S.turns && group == S.warpgroups - 1) pass_turn();
#pragma unroll 1
    for (;; ++n) {
      state.q_of(group).await_full(n);
      const Work<S>& work = state.work[n % State<S>::kWorks];
      if (work.rows.left() <= 0) break;
      attend(work);
      release_left();
    }
    release_left();
  }

  // ---- turns: a warpgroup issues its products before the next one issues its own

  static constexpr u32 kTurns = 2;  // the first one's barrier
  FOVEA_DEVICE void await_turn() const {
    if constexpr (S.turns) meet(kTurns + group, 256);
  }
  FOVEA_DEVICE void pass_turn() const {
    if constexpr (S.turns) pass(kTurns + (group + 1 == S.warpgroups ? 0 : group + 1), 256);
  }

  // ---- a tile of rows

  FOVEA_DEVICE void attend(const Work<S>& work) {
    const float slope = S.alibi ? Rules::slope_of(p, work.sequence, work.rows.first_head) : 0.0F;
    const Rules rules{p, work.sequence, work.rows, slope};
    const float unit = kBeginsWithSlopes && !S.bias ? p.scale * kLog2E : score_unit<S>(p);
    if constexpr (kBeginsWithSlopes) steep = slope / p.scale;
    const Band::Reach& reach = work.reach[group];
    full = {(reach.all_begin + S.block_n - 1) / S.block_n, reach.all_end / S.block_n};
    Soft soft;
    Out o;
    const auto epilogue = [&] {  // made when needed, so that nothing of it is kept over the loops
      return Epilogue<S>{p, work, rules, at.q(state.q[0].place(n)), warp_row()};
    };
    float factors[2];
    attend_all(work, rules, soft, o, unit, [&] {
      if constexpr (kEndsEarly) epilogue().end_rows(soft.reference, soft.sum, factors);
    });
    if constexpr (!kEndsEarly) epilogue().end_rows(soft.reference, soft.sum, factors);
    epilogue().finish(o, soft.reference, factors);
  }

  /// When all scores are made.
  FOVEA_DEVICE void release_q() {
    if constexpr (!leaves_through_q(S)) state.q_of(group).release(n);
  }

  /// Releases Q's place where O of the tile of rows before was stored through it.
  FOVEA_DEVICE void release_left() {
    if (!leaves_through_q(S) || left == n) return;
    await_additions_read<0>();
    state.q_of(group).release(left++);
  }

  /// Walks all tiles of keys, and calls end() when all sums are known, while the last P V is added.
  template <class End>
  FOVEA_DEVICE void attend_all(const Work<S>& work, const Rules& rules, Soft& soft, Out& o, float unit,
                               const End& end) {
    const Interval own = work.tiles_of(group);
    Step step{own.end - 1, 0};
    if constexpr (S.mask) {
      step = first_step(work);
    } else {
      skip(work.tiles.end - own.end);
    }
    if (S.mask ? hidden(work, step) : own.empty()) {
      release_q();
      clear(o);
      return end();
    }
    Scores s;
    Weights weights;
    bool brief = false;  // the tile whose P V comes next is a short one
    if constexpr (kShort < S.block_n) brief = uniform(work.reach[group].any_end - step.tile * S.block_n <= kShort);
    if (brief) {
      first_tile<kShort>(work, rules, soft, s, weights, o, unit, step);
    } else {
      first_tile<S.block_n>(work, rules, soft, s, weights, o, unit, step);
    }
    int add = 0;
#pragma unroll 1
    for (step.tile -= kStride; S.mask ? !step.last() : step.tile >= own.begin;
         step.tile -= kStride, add = 1, brief = false)
      next_tile(work, rules, soft, s, weights, o, unit, step, add, brief);
    release_q();
    last_values(weights, o, add, brief, end);
    if constexpr (!S.mask) skip(own.begin - work.tiles.begin);
  }

  /// With a mask: the first of the producer's tiles of which these 64 rows see something, or else the last one.
  FOVEA_DEVICE Step first_step(const Work<S>& work) {
    if (work.tiles.empty()) return {0, Step::kLast};
    for (;;) {
      state.k.await_full(keys);
      const Step step = step_of();
      if (!hidden(work, step)) return step;
      skip(1);
      if (step.last()) return step;
    }
  }
  /// The step of the next K.  Without turns ptxas has to be told that a warp agrees on it.
  FOVEA_DEVICE Step step_of() const {
    const Step step = state.steps[state.k.place(keys)];
    return S.turns ? step : Step{step.tile, uniform(step.seen)};
  }

  /// Passes over tiles that only other warpgroups see.
  FOVEA_DEVICE void skip(int tiles) {
#pragma unroll 1
    for (; tiles > 0; --tiles, ++keys) {
      await_turn();
      pass_turn();
      state.k.await_full(keys);
      state.k.release(keys);
      state.v.await_full(keys);
      state.v.release(keys);
    }
  }

  FOVEA_DEVICE u64 q_matrix() const {
    const u32 q = q_parts(S) == 1 ? at.q(state.q[0].place(n)) + group * kGroupRows * kPanelRowBytes : at.q(0, group);
    return matrix_at(q, 16);
  }
  template <int kPieces>
  FOVEA_DEVICE void issue_scores(Accumulator (&s)[1][kPieces]) const {
    state.k.await_full(keys);
    pin(s[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim, q_rows(S), kPieces * 8, S.block_n>(
        s[0], q_matrix(), matrix_at(at.k(state.k.place(keys)), 16), kBeginsWithSlopes ? 1 : 0);
    close_products();
  }
  FOVEA_DEVICE void issue_values(Out& o, Weights& weights, u32 of, int add, bool brief) const {
    state.v.await_full(of);
    pin(o[0]);
    pin(weights);
    fence_products();
    const u64 v = matrix_at(at.v(state.v.place(of)), S.block_n * kPanelRowBytes);
    if (kShort < S.block_n && uniform(brief)) {
      multiply_by_columns<S.type, kShort, S.head_dim_v>(o[0], weights, v, add);
    } else {
      multiply_by_columns<S.type, S.block_n, S.head_dim_v>(o[0], weights, v, add);
    }
    close_products();
  }

  FOVEA_DEVICE static math::DropoutStream stream_of(const Work<S>& work) {
    return S.dropout ? uniform(work.stream) : math::DropoutStream{};
  }

  FOVEA_DEVICE Sight sight_of(const Work<S>& work, const Step& step) const {
    return {kKnowsFull && full.contains(step.tile) ? TileState::kFull : work.band_of(group, step.tile),
            S.mask ? step.mask(group) : TileState::kFull};
  }

  /// Whether these rows see nothing of a tile.
  FOVEA_DEVICE bool hidden(const Work<S>& work, const Step& step) const {
    const bool nothing = sight_of(work, step).hidden();
    return S.turns ? nothing : uniform(nothing);
  }

  /// The first tile, without a P V of one before.  Only its first kKeys are seen.
  template <int kKeys>
  FOVEA_DEVICE void first_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& all, Weights& weights,
                               Out& o, float unit, const Step& step) {
    auto& s = reinterpret_cast<Accumulator(&)[1][kKeys / 8]>(all);
    const int row = warp_row(), key = step.tile * S.block_n;
    if constexpr (kBeginsWithSlopes) rules.begin_with_slopes(s, steep, row, key, soft.beside);
    await_turn();
    issue_scores(s);
    pass_turn();
    release_left();
    Found entries = entries_of(rules, row, key);
    await_products<0>();
    pin(s[0]);
    state.k.release(keys);
    finish(rules, s, sight_of(work, step), entries);
    float total[2];
    raise(soft, s, o, unit, entries, false);
    soft.weigh(s, weights, total, unit, entries, stream_of(work));
    soft.add(total);
#pragma unroll
    for (int k = kKeys / 16; k < Soft::kSteps; ++k) weights[k] = {};
    ++keys;
  }

  /// S of this tile while P V of the one before is made.  The mask is looked at after the products are issued, so that
  /// they wait for nothing; where these rows see nothing of the tile, their weights are 0.
  FOVEA_DEVICE void next_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& s, Weights& weights, Out& o,
                              float unit, Step& step, int add, bool brief) {
    if constexpr (kBeginsWithSlopes) rules.begin_with_slopes(s, steep, warp_row(), step.tile * S.block_n, soft.beside);
    await_turn();
    issue_scores(s);
    issue_values(o, weights, keys - 1, add, brief);
    pass_turn();
    if constexpr (S.mask) step = step_of();
    if (S.mask && hidden(work, step)) return pass_over(o, weights);
    const int row = warp_row(), key = step.tile * S.block_n;
    Found entries = entries_of(rules, row, key);
    await_products<1>();
    pin(s[0]);
    state.k.release(keys);
    if constexpr (!S.hold) values_done(o, weights);
    Weights held;
    Weights& next = S.hold ? held : weights;
    float total[2];
    bool weighed = false;
    if constexpr (Soft::kWeighsCapped) {
      weighed = sight_of(work, step).band == TileState::kFull && soft.weigh_capped(s, next, total, entries) &&
                !Soft::outgrown(total);
    }
    if (!weighed) {
      finish(rules, s, sight_of(work, step), entries);
      soft.weigh(s, next, total, unit, entries, stream_of(work));
      if (Soft::outgrown(total)) {
        if constexpr (S.hold) await_products<0>(), pin(o[0]);
        raise(soft, s, o, unit, entries, true);
        soft.weigh(s, next, total, unit, entries, stream_of(work));
      }
    }
    soft.add(total);
    if constexpr (S.hold) {
      values_done(o, weights);
      move(weights, held);
    }
    ++keys;
  }

  /// A tile of which these rows see nothing.
  FOVEA_DEVICE void pass_over(Out& o, Weights& weights) {
    values_done(o, weights);
    state.k.release(keys++);
#pragma unroll
    for (OperandA& none : weights) none = {};
  }

  /// The entries of the next computed tile.
  FOVEA_DEVICE Found entries_of(const Rules& rules, int row, int key) const {
    Found entries{p, rules, row, key, S.bias ? at.bias(group, state.entries[group].place(fetched)) : 0};
    if constexpr (S.bias) {
      if (!p.bias_by_engine) entries.copy_bias();
    }
    if constexpr (S.mask) {
      state.entries[group].await_full(fetched);
      entries.read_words(at.words(group, state.entries[group].place(fetched)));
    }
    return entries;
  }

  /// A tile's products become scores.
  template <int kPieces>
  FOVEA_DEVICE void finish(const Rules& rules, Accumulator (&s)[1][kPieces], const Sight& sight, Found& entries) {
    auto& ring = state.entries[group];
    const bool ahead = S.mask || S.bias && p.bias_by_engine;
    if (!S.mask && ahead) ring.await_full(fetched);
    if constexpr (!kBeginsWithSlopes) rules.score(s, entries.row, entries.key, entries);
    if constexpr (kBeginsWithSlopes && S.bias) entries.add_bias(s, p.scale);
    if constexpr (S.mask) {
      if (sight.mask != TileState::kFull || sight.band == TileState::kPartial) {
        entries.narrow(sight);
        entries.hide(s);
      }
    } else {
      rules.hide(s, entries.row, entries.key, sight, entries);
    }
    if (ahead) ring.release(fetched++);
  }

  /// Takes references from a tile's scores, and rescales sums and O if there are any yet (`begun`).
  template <int kPieces>
  FOVEA_DEVICE void raise(Soft& soft, Accumulator (&s)[1][kPieces], Out& o, float unit, const Found& entries,
                          bool begun) const {
    if constexpr (S.bias) entries.hide_by_bias(s);
    float rescale[2];
    soft.raise(s, unit, rescale);
    if (!begun) return;
    soft.sum[0] *= rescale[0], soft.sum[1] *= rescale[1];
#pragma unroll
    for (int x = 0; x < 4 * Epilogue<S>::kD; ++x) o[0][x / 4].x[x % 4] *= rescale[x % 4 / 2];
  }

  FOVEA_DEVICE void values_done(Out& o, Weights& weights) {
    await_products<0>();
    pin(o[0]);
    pin(weights);
    state.v.release(keys - 1);
  }

  template <class Meanwhile>
  FOVEA_DEVICE void last_values(Weights& weights, Out& o, int add, bool brief, const Meanwhile& meanwhile) {
    issue_values(o, weights, keys - 1, add, brief);
    meanwhile();
    await_products<0>();
    pin(o[0]);
    state.v.release(keys - 1);
  }
};

}  // namespace fovea::cuda
