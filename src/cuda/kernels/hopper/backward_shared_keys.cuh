#pragma once

#include "cuda/kernels/hopper/backward_owner.cuh"

// Where head dims are wide, dk and dv of 64 keys take the registers of two warpgroups: one makes S, P and dv, the other
// dP, dS and dk.  P goes from one to the other through shared memory, in the place that dS takes afterwards; the same
// warps of both have the same entries.  dS is also sent to the other block of the pair.
namespace fovea::cuda {

/// How both learn whether, in a tile with hidden entries, all products were finite.
template <BackwardSpec S>
struct Agreement {
  enum Who { kWeights, kGradients };
  BackwardState<S>& state;

  /// check: a lane's, 0 where all was finite.
  FOVEA_DEVICE void tell(Who who, u32 n, float check) const {
    if (__any_sync(kAllLanes, !(check == 0.0F)) && lane_id() == 0) state.strange[who][n & 1] = n + 1;
  }
  /// Once both have told: P has been announced, and that dP was looked at.
  FOVEA_DEVICE bool broken(u32 n) const {
    state.looked.await_full(n);
    return uniform(state.strange[kWeights][n & 1] == n + 1 || state.strange[kGradients][n & 1] == n + 1);
  }
};

/// S, P and dv.
template <BackwardSpec S>
struct WeightsConsumer : BackwardOwner<S> {
  using Owner = BackwardOwner<S>;
  using Owner::p, Owner::state, Owner::at, Owner::step, Owner::warp_key, Owner::lane_key;
  using Owner::rows_of, Owner::see, Owner::issue_scores, Owner::put;
  using typename Owner::Columns, typename Owner::Entries, typename Owner::Packed;
  using Sum = Accumulator[1][S.head_dim_v / 8];
  static constexpr bool kLooksAhead = false;

  FOVEA_DEVICE void run() const {
    Sum dv;
    clear(dv);
    pin(dv[0]);
    state.k.await_full(0), state.v.await_full(0);
    this->gather(*this, dv);
    Owner::template store_sum<S.head_dim_v>(at.v(), dv[0], S.dropout ? p.keep_scale : 1.0F, p.head_dim_v, p.dv,
                                            p.dv_parts);
  }

  /// kHides: some entry may be hidden, as by a bias any; both warpgroups first agree on whether all is finite.
  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Sum& dv) const {
    constexpr bool kChecks = kHides || S.bias;
    const Step& now = step(n);
    Entries s;
    Packed weights;
    issue_scores(s, n);
    const RowMap<Packing::kNone> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(n), S.dropout ? uniform(now.stream) : math::DropoutStream{}, {}, {}, {}};
    if constexpr (kHides) see(columns, n);
    await_products<0>();
    pin(s[0]);
    float check = kChecks ? Columns::not_finite(s) : 0.0F;
    if constexpr (kChecks && S.softcap)
      pin(check), pin(s[0]);  // or products are kept beside what softcap makes of them
    columns.finish(s), this->add_bias(columns, s, n);
    if constexpr (S.dropout) columns.draw();
    columns.weigh(s, at.log2_lse(state.q.place(n)));
    state.q.release(n);
    columns.pack(weights, s);
    if constexpr (kHides) columns.hide(weights);
    state.ds.await_empty(n);
    if constexpr (S.softcap) {
      Packed sloped;
      columns.template pass_softcap<false>(s);
      columns.pack(sloped, s);
      if constexpr (kHides) columns.hide(sloped);
      put(sloped, n);
    } else {
      put(weights, n);
    }
    if constexpr (S.dropout) store_shared(at.dropped(n), columns.dropped[0]);
    const Agreement<S> agreement{state};
    if constexpr (kChecks) agreement.tell(agreement.kWeights, n, check);
    state.weights.announce(n);
    if constexpr (S.dropout) columns.drop(weights);
    state.dout.await_full(n);
    const u32 dout = at.dout(state.dout.place(n));
    if (kChecks && agreement.broken(n)) {
      columns.hide_by_bias(weights);
      state.ds.await_empty(n + 2);  // once dq is made, dS's place is P's again
      put(weights, n);
      __syncwarp();
      this->add_seen_columns(dv[0], at.ds(n), dout);
    } else {
      Owner::template issue_sum<S.head_dim_v>(dv[0], weights, dout);
      await_products<0>();
      pin(dv[0]), pin(weights);
    }
    state.looked.await_full(n);  // nobody still reads dout or V
    state.looked.release(n);
    state.dout.release(n);
  }
};

/// dP, dS and dk.
template <BackwardSpec S>
struct GradientConsumer : BackwardOwner<S> {
  using Owner = BackwardOwner<S>;
  using Owner::p, Owner::state, Owner::at, Owner::step, Owner::warp_key, Owner::lane_key;
  using Owner::rows_of, Owner::issue_dp, Owner::put, Owner::meeting, Owner::clear_slope_parts, Owner::add_slope;
  using typename Owner::Columns, typename Owner::Entries, typename Owner::Packed;

  static constexpr bool kLooksAhead = false;

  struct Sums {
    Accumulator dk[1][S.head_dim / 8];
    float slope = 0.0F;  // a thread's part, of the head at hand
  };

  FOVEA_DEVICE void run() const {
    Sums sums;
    clear(sums.dk);
    pin(sums.dk[0]);
    if constexpr (S.alibi) clear_slope_parts();
    state.k.await_full(0), state.v.await_full(0);
    const u32 tiles = this->gather(*this, sums);
    this->end_walk(tiles);
    this->await_end(tiles);
    Owner::template store_sum<S.head_dim>(at.k(), sums.dk[0], p.scale, p.head_dim, p.dk, p.dk_parts);
  }

  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Sums& sums) const {
    constexpr bool kChecks = kHides || S.bias;
    const Step& now = step(n);
    const int place = state.q.place(n);
    Entries dp;
    Packed weights, ds;
    issue_dp(dp, n);
    const RowMap<Packing::kNone> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(n), {}, {}, {}, {}};
    // A row that sees a NaN weighs by it what a bias hides from it, too, and only delta tells.
    const float of_delta = S.bias ? Columns::not_finite_delta(at.delta(state.dout.place(n))) : 0.0F;
    await_products<0>();
    pin(dp[0]);
    state.weights.await_full(n);
    take(weights, n);
    if constexpr (S.dropout) columns.dropped[0] = load_shared(at.dropped(n));
    const float check = kChecks ? of_delta + Columns::not_finite(dp) : 0.0F;
    columns.template differentiate<kHides>(dp, weights, at.delta(state.dout.place(n)));
    const Agreement<S> agreement{state};
    if constexpr (kChecks) agreement.tell(agreement.kGradients, n, check);
    state.looked.await_empty(n);
    state.looked.announce(n);
    columns.pack(ds, dp);
    if (kChecks && agreement.broken(n)) {
      columns.hide_by_bias(ds);
      if constexpr (S.alibi && S.bias) columns.hide_as(dp, ds);
      if constexpr (S.alibi) add_slope(n, columns.slope_part(dp), sums.slope);
      put(ds, n);
      fence_engine();
      __syncwarp();
      this->add_seen_columns(sums.dk[0], at.ds(n), at.q(place));
      hand_out(n);  // P takes its place then
    } else {
      if constexpr (S.alibi) add_slope(n, columns.slope_part(dp), sums.slope);
      Owner::template issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));  // hides what a shared dS costs
      put(ds, n);
      fence_engine();
      hand_out(n);
      await_products<0>();
      pin(sums.dk[0]), pin(ds);
    }
    state.q.release(n);
  }

  /// What the other warpgroup has put there.
  FOVEA_DEVICE void take(Packed& weights, u32 n) const {
    const u32 mine = Owner::part_of_ds(n);
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) load_matrices_transposed(weights[k].x, mine + k * 16 * kPanelRowBytes);
  }
  /// dS, to who makes dq here and in the other block.
  FOVEA_DEVICE void hand_out(u32 n) const {
    constexpr u32 kBytes = BackwardLayout<S>::kShared.ds_stage;
    meet(meeting(), 128);
    if (threadIdx.x % 128 != 0) return;
    Barrier& full = state.ds.full[state.ds.place(n)];
    full.arrive_with(kBytes);  // of the other's
    send_bytes(at.other_ds(n), at.ds(n), kBytes, full);
  }
};

}  // namespace fovea::cuda
