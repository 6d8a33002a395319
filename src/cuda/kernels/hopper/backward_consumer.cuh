#pragma once

#include "cuda/kernels/hopper/backward_end.cuh"
#include "cuda/kernels/hopper/backward_owner.cuh"

// A warpgroup of the backward that owns 64 of the block's keys: their dk and dv stay in its registers, and dS goes to
// shared memory, for the warpgroup that makes dq.
namespace fovea::cuda {

template <BackwardSpec S>
struct BackwardConsumer : BackwardOwner<S> {
  using Owner = BackwardOwner<S>;
  using Owner::clear_slope_parts, Owner::add_slope;
  using Owner::p, Owner::state, Owner::at, Owner::task, Owner::step, Owner::meeting, Owner::warp_key, Owner::lane_key;
  using Owner::rows_of, Owner::see, Owner::issue_scores, Owner::issue_dp, Owner::put, Owner::add_bias,
      Owner::bias_hides;
  using typename Owner::Columns, typename Owner::Entries, typename Owner::Packed, typename Owner::Ahead;

  /// While the products of the tile before are made; where sums are wide that gains nothing.
  static constexpr bool kLooksAhead = S.block_m > kGroupRows || S.head_dim <= 96;

  /// What a warpgroup gathers.
  struct Sums {
    Accumulator dk[1][S.head_dim / 8];
    Accumulator dv[1][S.head_dim_v / 8];
    float slope = 0.0F;  // a thread's part, of the head at hand
  };

  FOVEA_DEVICE void run() const {
    if constexpr (S.holds_dq) {
      u32 n = 0;
#pragma unroll 1
      for (int block = 0;; ++block, ++n) {
        n = with(block).gather_keys(n);
        if (uniform(state.last_keys(block))) break;
      }
    } else if constexpr (S.goes_on) {
      u32 n = 0;
#pragma unroll 1
      for (int i = 0; state.has_task(i); ++i, ++n) {
        if (state.ends_dq(i)) {
          with(i).end_dq(n);
        } else {
          n = with(i).gather_keys(n);
        }
      }
    } else {
      Sums sums;
      begin(sums);
      const u32 tiles = this->gather(*this, sums);
      this->end_walk(tiles);
      meet(meeting(), 128);
      store_dv(sums, at.v());  // while the last dq is made
      this->await_end(tiles);
      store_dk(sums, at.k());
    }
  }
  /// The same at another task, or tile of keys.
  FOVEA_DEVICE BackwardConsumer with(int task) const { return {{p, state, at, this->first_key, task}}; }

  FOVEA_DEVICE void begin(Sums& sums) const {
    clear(sums.dk), clear(sums.dv);
    pin(sums.dk[0]), pin(sums.dv[0]);
    if constexpr (S.alibi && !S.holds_dq) clear_slope_parts();
    state.k.await_full(task);
    state.v.await_full(task);
  }
  /// One task or tile of keys of many, from step n on; the step behind its last one.  dk leaves by way of that step's
  /// place for dS, in which each warpgroup has a part of its own, while the next keys are copied; dv, too, where dq is
  /// held, and else by way of V's place.
  FOVEA_DEVICE u32 gather_keys(u32 n) const {
    Sums sums;
    begin(sums);
    if constexpr (S.alibi) {
      state.q.await_full(n);
      clear_slope_parts(n);
    }
    n = this->gather(*this, sums, n);
    state.k.release(task);
    pass_step(n);
    if constexpr (S.goes_on) {
      meet(meeting(), 128);
      store_dv(sums, at.v(task), n);
      fence_engine();
    }
    state.v.release(task);
    this->end_walk(n);
    const u32 mine = at.ds(n) + this->first_key / kPanelColumns * (Owner::kRowPanel - kGroupRows * kPanelRowBytes);
    if constexpr (S.holds_dq) store_dv(sums, mine, n);
    __syncwarp();
    store_dk(sums, mine, n);
    meet(meeting(), 128);  // the next dS there is everybody's
    return n;
  }
  /// Step n, which has no rows.
  FOVEA_DEVICE void pass_step(u32 n) const {
    state.q.release(n);
    state.dout.await_full(n);  // with nothing in it
    state.dout.release(n);
    if constexpr (S.bias) {
      state.bias.await_full(n);
      state.bias.release(n);
    }
  }
  /// A task that has no keys, and step n; the rows' places are the producer's again when all is done.
  FOVEA_DEVICE void end_dq(u32 n) const {
    state.q.await_full(n);
    state.k.release(task), state.v.release(task);
    this->end_walk(n);
    meet(BackwardEnd<S>::kMemoryIsFree, 3 * 128);
    BackwardEnd<S>{p}.run(state.task(task));
    pass_step(n);
  }

  // ---- a tile of rows

  /// hides: some entry may be hidden.  Where all of S and dP is finite, so are q, dout and K, and weights of 0 add
  /// zeros: then the tile goes on as if nothing were hidden.  A bias may hide any entry.
  FOVEA_DEVICE void tile(u32 n, bool hides, Ahead& ahead, Sums& sums) const {
    Entries own;
    if constexpr (!Owner::kAsksAhead) issue_scores(own, n);
    Entries& s = Owner::kAsksAhead ? ahead.scores : own;
    const RowMap<Packing::kNone> rows = rows_of(step(n));
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(n), S.dropout ? uniform(step(n).stream) : math::DropoutStream{}, {}, {}, {}};
    if constexpr (S.bias) {
      hides = hides || bias_hides(columns, n);
    } else if (hides) {
      see(columns, n);
    }
    await_products<0>();
    pin(s[0]);
    float check = hides ? Columns::not_finite(s) : 0.0F;
    if constexpr (S.softcap) pin(check), pin(s[0]);  // or products are kept beside what softcap makes of them
    columns.finish(s), add_bias(columns, s, n);
    if (hides) {
      go_on<true>(n, state.q.place(fresh(n)), columns, s, check, ahead, sums);
    } else {
      go_on<false>(n, state.q.place(n), columns, s, check, ahead, sums);
    }
  }

  template <bool kHides>
  FOVEA_DEVICE void go_on(u32 n, int place, Columns& columns, Entries& s, float check, Ahead& ahead, Sums& sums) const {
    Entries dp;
    Packed weights;
    if constexpr (kHides && S.bias) see(columns, n);  // not before, or the tile that hides nothing spills
    if constexpr (S.dropout) columns.draw();          // under dP it takes 8 to 13% longer
    columns.weigh(s, at.log2_lse(place));
    columns.pack(weights, s);
    if constexpr (kHides) columns.hide(weights);
    pin(weights);  // before dP takes as many registers as S had
    issue_dp(dp, n);
    if constexpr (!kHides && !S.dropout) issue_dv(weights, place, sums);
    await_products<!kHides && !S.dropout ? 1 : 0>();
    pin(dp[0]);
    if constexpr (kHides) {
      check += columns.not_finite_gradients(dp, at.delta(place));
      if (uniform(meet_any(meeting(), 128, !(check == 0.0F)))) {
        add<true>(fresh(n), columns, dp, weights, ahead, sums);  // whose addresses take no registers before
        return;
      }
      if constexpr (!S.dropout) issue_dv(weights, place, sums);
    }
    add<false>(n, columns, dp, weights, ahead, sums);
  }

  FOVEA_DEVICE void issue_dv(Packed& weights, int place, Sums& sums) const {
    Owner::template issue_sum<S.head_dim_v>(sums.dv[0], weights, at.dout(place));
  }

  /// Of P and dP: dS, for who makes dq, and dk; dv where it is not under way yet.  kTermByTerm: of what is seen alone.
  template <bool kTermByTerm>
  FOVEA_DEVICE void add(u32 n, Columns& columns, Entries& dp, Packed& weights, Ahead& ahead, Sums& sums) const {
    const int place = state.q.place(n);
    Packed ds;
    if constexpr (kTermByTerm) columns.hide_by_bias(weights);
    columns.template differentiate<kTermByTerm>(dp, weights, at.delta(place));
    if constexpr (S.alibi) columns.key = lane_key(fresh(n)), add_slope(n, columns.slope_part(dp), sums.slope);
    if constexpr (S.softcap) columns.template pass_softcap<kTermByTerm>(dp);
    columns.pack(ds, dp);
    if constexpr (S.dropout) columns.drop(weights);
    if constexpr (!kTermByTerm) {  // hides what a shared dS costs
      if constexpr (S.dropout) issue_dv(weights, place, sums);
      Owner::template issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));
    }
    share<kTermByTerm>(ds, n);
    if constexpr (kTermByTerm) add_seen(n, place, weights, sums);
    if constexpr (kLooksAhead) this->look_ahead(ahead, fresh(n) + 1);
    if constexpr (!kTermByTerm) {
      await_products<Owner::kAsksAhead ? 1 : 0>();
      pin(sums.dv[0]), pin(sums.dk[0]), pin(weights), pin(ds);
    }
    state.dout.release(n);
    state.q.release(n);
  }

  /// Tile n's dS, to who makes dq; kTermByTerm: of what is seen alone.
  template <bool kTermByTerm>
  FOVEA_DEVICE void share(const Packed& ds, u32 n) const {
    state.ds.await_empty(n);
    put(ds, n);
    fence_engine();
    if constexpr (kTermByTerm) state.spoiled[n & 1] = true;
    state.ds.announce(n);
  }

  // ---- where something hidden is not finite

  /// By way of shared memory, where each warp finds what it has put there itself: P in the place of the next dS.
  FOVEA_DEVICE void add_seen(u32 n, int place, const Packed& weights, Sums& sums) const {
    state.ds.await_empty(n + 1);
    put(weights, n + 1);
    __syncwarp();
    this->add_seen_columns(sums.dv[0], at.ds(n + 1), at.dout(place));
    this->add_seen_columns(sums.dk[0], at.ds(n), at.q(place));
    __syncwarp();
  }

  // ---- the end, through shared memory that nobody still reads, by each warp for its keys

  FOVEA_DEVICE void store_dv(const Sums& sums, u32 by, u32 n = 0) const {
    Owner::template store_sum<S.head_dim_v, !S.holds_dq>(by, sums.dv[0], S.dropout ? p.keep_scale : 1.0F, p.head_dim_v,
                                                         p.dv, p.dv_parts, n);
  }
  FOVEA_DEVICE void store_dk(const Sums& sums, u32 by, u32 n = 0) const {
    Owner::template store_sum<S.head_dim, !S.holds_dq && !S.goes_on>(by, sums.dk[0], p.scale, p.head_dim, p.dk,
                                                                     p.dk_parts, n);
  }
};

}  // namespace fovea::cuda
