#pragma once

#include "cuda/kernels/hopper/backward_owner.cuh"

// Where head dims are wide, dk and dv of 64 keys take the registers of two warpgroups: one makes S, P and dv, the other
// dP, dS and dk.  P goes from one to the other through shared memory, thread by thread, for the same thread of both has
// the same entries.
namespace fovea::cuda {

/// P on its way: of 16 rows 16 bytes a thread, then what dropout keeps, a word each.
template <BackwardSpec S>
struct WeightsPlace {
  using Packed = typename GradientColumns<S>::Packed;
  static constexpr int kSteps = S.block_m / 16, kStepBytes = 128 * 16;
  u32 address;

  FOVEA_DEVICE static u32 thread() { return threadIdx.x % 128; }
  FOVEA_DEVICE u32 mine(int step) const { return address + step * kStepBytes + thread() * 16; }
  FOVEA_DEVICE u32 kept() const { return address + kSteps * kStepBytes + thread() * 4; }

  FOVEA_DEVICE void write(const Packed& weights) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const u32(&x)[4] = weights[k].x;
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(mine(k)), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                   : "memory");
    }
  }
  FOVEA_DEVICE void read(Packed& weights) const {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      u32(&x)[4] = weights[k].x;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                   : "r"(mine(k))
                   : "memory");
    }
  }
  /// Where the weight of a row and a key lies.
  FOVEA_DEVICE u32 of(int row, int key) const {
    const int lane = key % 8 * 4 + row % 8 / 2, word = row / 8 % 2 * 2 + key / 8 % 2;
    return address + row / 16 * kStepBytes + (key / 16 * kWarp + lane) * 16 + word * 4 + row % 2 * 2;
  }
};

/// How both agree on whether all was finite that something hides in a tile.
template <BackwardSpec S>
struct Agreement {
  enum Who { kWeights, kGradients };
  BackwardState<S>& state;

  /// check: of a lane, 0 where it was.
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
  using Owner::rows_of, Owner::see, Owner::issue_scores, Owner::clear_slope_parts;
  using typename Owner::Columns, typename Owner::Entries, typename Owner::Packed;
  using Sum = Accumulator[1][S.head_dim_v / 8];

  FOVEA_DEVICE void run() const {
    Sum dv;
    clear(dv);
    pin(dv[0]);
    if constexpr (S.alibi) clear_slope_parts();
    state.k.wait(0), state.v.wait(0);
    this->gather(*this, dv);
    Owner::template store_sum<S.head_dim_v>(at.v(), dv[0], S.dropout ? p.keep_scale : 1.0F, p.head_dim_v, p.dv);
  }

  /// kHides: some entry may be hidden; both warpgroups then agree on whether all is finite before they add.
  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Sum& dv) const {
    const Step& now = step(n);
    Entries s;
    Packed weights;
    issue_scores(s, n);
    const RowMap<false> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(), S.dropout ? uniform(now.stream) : math::DropoutStream{}, {}, {}, {}};
    if constexpr (kHides) see(columns, n);
    await_products<0>();
    pin(s[0]);
    const float check = columns.template weigh<kHides>(s, at.log2_lse(state.q.place(n)));
    state.q.release(n);
    columns.pack(weights, s);
    const WeightsPlace<S> place{at.weights(n)};
    state.weights.await_empty(n);
    if constexpr (S.softcap) {
      Packed sloped;
      columns.pass_softcap(s);
      columns.pack(sloped, s);
      place.write(sloped);
    } else {
      place.write(weights);
    }
    if constexpr (S.dropout) store_shared(place.kept(), columns.kept[0]);
    const Agreement<S> agreement{state};
    if constexpr (kHides) agreement.tell(agreement.kWeights, n, check);
    state.weights.announce(n);
    if constexpr (S.dropout) columns.drop(weights);
    state.dout.await_full(n);
    const u32 dout = at.dout(state.dout.place(n));
    if (kHides && agreement.broken(n)) {
      place.write(weights);  // in the place that the others have read
      __syncwarp();
      Owner::template multiply_seen_by_columns<S.block_m>(
          dv[0], warp_key(), [&](int row, int key) { return place.of(row, key); },
          [&](int row, u32 column) { return element<S.block_m>(dout, row, column); });
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
  using Owner::rows_of, Owner::issue_dp, Owner::clear_slope_parts, Owner::add_slope;
  using typename Owner::Columns, typename Owner::Entries, typename Owner::Packed;

  struct Sums {
    Accumulator dk[1][S.head_dim / 8];
    float slope = 0.0F;  // a thread's part, of the head at hand
  };

  FOVEA_DEVICE void run() const {
    Sums sums;
    clear(sums.dk);
    pin(sums.dk[0]);
    if constexpr (S.alibi) clear_slope_parts();
    state.k.wait(0), state.v.wait(0);
    const u32 tiles = this->gather(*this, sums);
    this->end_walk(tiles);
    this->await_end(tiles);
    Owner::template store_sum<S.head_dim>(at.k(), sums.dk[0], p.scale, p.head_dim, p.dk);
  }

  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Sums& sums) const {
    const Step& now = step(n);
    const int place = state.q.place(n);
    Entries dp;
    Packed weights, ds;
    issue_dp(dp, n);
    const RowMap<false> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(), {}, {}, {}, {}};
    await_products<0>();
    pin(dp[0]);
    const WeightsPlace<S> from{at.weights(n)};
    state.weights.await_full(n);
    from.read(weights);
    if constexpr (S.dropout) columns.kept[0] = load_shared(from.kept());
    const float check = kHides ? Columns::not_finite(dp) : 0.0F;
    columns.template differentiate<kHides>(dp, weights, at.delta(state.dout.place(n)));
    state.weights.release(n);
    const Agreement<S> agreement{state};
    if constexpr (kHides) agreement.tell(agreement.kGradients, n, check);
    state.looked.await_empty(n);
    state.looked.announce(n);
    if constexpr (S.alibi) add_slope(n, columns.slope_part(dp), sums.slope);
    columns.pack(ds, dp);
    if (kHides && agreement.broken(n)) {
      Owner::template share<true>(ds, n);
      Owner::template multiply_seen_by_columns<S.block_m>(
          sums.dk[0], warp_key(), [&](int row, int key) { return element<S.block_m>(at.ds(n), row, key); },
          [&](int row, u32 column) { return element<S.block_m>(at.q(place), row, column); });
    } else {
      Owner::template issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));  // hides what a shared dS costs
      Owner::template share<false>(ds, n);
      await_products<0>();
      pin(sums.dk[0]), pin(ds);
    }
    state.q.release(n);
  }
};

}  // namespace fovea::cuda
