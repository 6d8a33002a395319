#pragma once

#include "cuda/kernels/hopper/backward_state.cuh"
#include "cuda/kernels/hopper/gradient_columns.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// A warpgroup of the backward that owns 64 of the block's keys: their dk and dv stay in its registers, and dS goes to
// shared memory, for the warpgroup that makes dq.
namespace fovea::cuda {

FOVEA_DEVICE void store_matrices_transposed(u32 address, const OperandA& a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a.x[0]),
               "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3])
               : "memory");
}

template <BackwardSpec S>
struct BackwardConsumer {
  using Columns = GradientColumns<S>;
  using Entries = typename Columns::Entries;
  using Packed = typename Columns::Packed;
  static constexpr int kKeyPanel = S.block_n * kPanelRowBytes, kRowPanel = S.block_m * kPanelRowBytes;
  static constexpr u32 kMeetings = 2;  // the barriers of both warpgroups, from this one on

  /// What a warpgroup gathers.
  struct Sums {
    Accumulator dk[1][S.head_dim / 8];
    Accumulator dv[1][S.head_dim_v / 8];
    float slope = 0.0F;  // a thread's part, of the head at hand
  };

  const BackwardSm90Params& p;
  BackwardState<S>& state;
  const BackwardLayout<S> at;
  const int group;

  FOVEA_DEVICE const Step& step(u32 n) const { return state.step(n); }
  FOVEA_DEVICE int key() const { return state.walk.key_block * S.block_n; }
  FOVEA_DEVICE int warp_key() const { return group * kGroupRows + warp_id() % 4 * 16; }

  FOVEA_DEVICE void run() const {
    Sums sums;
    clear(sums.dk), clear(sums.dv);
    pin(sums.dk[0]), pin(sums.dv[0]);
    if constexpr (S.alibi) clear_slope_parts();
    state.k.wait(0);
    state.v.wait(0);
    u32 n = 0;
#pragma unroll 1
    for (;; ++n) {
      state.q.await_full(n);
      if (!uniform(step(n).exists)) break;
      if (!S.bias && uniform(step(n).template full<S.mask>())) {  // a bias may hide what it likes
        tile<false>(n, sums);
      } else {
        tile<true>(n, sums);
      }
    }
    state.ds.await_empty(n);
    state.ds.announce(n);         // that there is none
    state.ds.await_empty(n + 1);  // nobody still reads K
    meet(kMeetings + group, 128);
    store(sums);
  }

  // ---- products, issued and not awaited

  FOVEA_DEVICE u64 keys_at(u32 tile) const { return matrix_at(tile + group * kGroupRows * kPanelRowBytes, 16); }
  FOVEA_DEVICE void issue_scores(Entries& s, u32 n) const {
    pin(s[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim, S.block_n, S.block_m>(s[0], keys_at(at.k()),
                                                               matrix_at(at.q(state.q.place(n)), 16));
    close_products();
  }
  /// From −delta on, where nothing is done to dP before that is taken off.
  FOVEA_DEVICE void issue_dp(Entries& dp, u32 n) const {
    state.dout.await_full(n);
    if constexpr (Columns::kDeltaFirst) Columns::begin_with_delta(dp, at.delta(state.dout.place(n)));
    pin(dp[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim_v, S.block_n, S.block_m>(
        dp[0], keys_at(at.v()), matrix_at(at.dout(state.dout.place(n)), 16), Columns::kDeltaFirst ? 1 : 0);
    close_products();
  }
  /// dv from Pᵀ and dout, dk from dSᵀ and q.
  template <int kDim>
  FOVEA_DEVICE static void issue_sum(Accumulator (&sum)[kDim / 8], Packed& entries, u32 rows) {
    pin(sum);
    pin(entries);
    fence_products();
    multiply_by_columns<S.type, S.block_m, kDim>(sum, entries, matrix_at(rows, kRowPanel), 1);
    close_products();
  }
  // ---- a tile of rows

  /// kHides: some entry may be hidden.  Where what is hidden is not finite, sums are made term by term of what is seen.
  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Sums& sums) const {
    constexpr bool kEarlyDv = !kHides && !S.dropout;  // dropout takes its part of the weights when dS is made
    const Step& now = step(n);
    const int place = state.q.place(n);
    Entries s, dp;
    typename Columns::Bits seen;
    Packed weights, ds;
    issue_scores(s, n);
    if constexpr (S.mask) look_up(seen, now);
    const RowMap<false> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(), S.dropout ? uniform(now.stream) : math::DropoutStream{}, seen, {}, {}};
    await_products<0>();
    pin(s[0]);
    float check = columns.template weigh<kHides>(s, at.log2_lse(place), now.full_band);
    columns.pack(weights, s);
    pin(weights);  // before dP takes as many registers as S had
    issue_dp(dp, n);
    if constexpr (kEarlyDv) issue_sum<S.head_dim_v>(sums.dv[0], weights, at.dout(place));
    await_products<kEarlyDv ? 1 : 0>();
    pin(dp[0]);
    check += columns.template differentiate<kHides>(dp, weights, at.delta(place));
    if constexpr (S.alibi) add_slope(n, columns.slope_part(dp), sums.slope);
    if constexpr (S.softcap) columns.pass_softcap(dp);
    columns.pack(ds, dp);
    if constexpr (S.dropout) columns.drop(weights);
    if constexpr (!kHides) {  // hides what a shared dS costs
      if constexpr (!kEarlyDv) issue_sum<S.head_dim_v>(sums.dv[0], weights, at.dout(place));
      issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));
    }
    state.ds.await_empty(n);
    put(ds, n);
    fence_engine();
    if (kHides && uniform(meet_any(kMeetings + group, 128, !(check == 0.0F)))) {
      state.spoiled[n & 1] = true;
      state.ds.announce(n);
      add_seen(n, place, weights, sums);
    } else {
      state.ds.announce(n);
      if constexpr (kHides) {
        issue_sum<S.head_dim_v>(sums.dv[0], weights, at.dout(place));
        issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));
      }
      await_products<0>();
      pin(sums.dv[0]), pin(sums.dk[0]), pin(weights), pin(ds);
    }
    state.dout.release(n);
    state.q.release(n);
  }

  FOVEA_DEVICE RowMap<false> rows_of(const Step& at) const {
    return {at.tile * S.block_m, state.walk.sequence.q_rows, at.head, 1};
  }
  FOVEA_DEVICE int lane_key() const { return key() + warp_key() + lane_id() / 4; }

  /// While the scores are made.
  FOVEA_DEVICE void look_up(typename Columns::Bits& seen, const Step& now) const {
    if (now.mask == TileState::kPartial) {
      const RowMap<false> rows = rows_of(now);
      Columns::look_up(seen, {p, state.walk.sequence, rows}, lane_key());
    } else {
#pragma unroll
      for (u32& word : seen) word = ~0U;
    }
  }

  /// dS, [row][key], to where both warpgroups find it.
  FOVEA_DEVICE void put(const Packed& ds, u32 n) const {
    const int lane = fresh(lane_id());
    const u32 mine = swizzled(at.ds(n) + group * kRowPanel, lane / 16 * 8 + lane % 8, warp_id() % 4 * 2 + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) store_matrices_transposed(mine + k * 16 * kPanelRowBytes, ds[k]);
  }

  // ---- where something hidden is not finite

  /// By way of shared memory, where each warp finds what it has put there itself: P in the place of the next dS.
  FOVEA_DEVICE void add_seen(u32 n, int place, const Packed& weights, Sums& sums) const {
    state.ds.await_empty(n + 1);
    put(weights, n + 1);
    __syncwarp();
    multiply_seen_by_columns<S.block_m>(
        sums.dv[0], warp_key(), [&](int k, int row) { return element<S.block_m>(at.ds(n + 1), k, row); },
        [&](int k, u32 column) { return element<S.block_m>(at.dout(place), k, column); });
    multiply_seen_by_columns<S.block_m>(
        sums.dk[0], warp_key(), [&](int k, int row) { return element<S.block_m>(at.ds(n), k, row); },
        [&](int k, u32 column) { return element<S.block_m>(at.q(place), k, column); });
    __syncwarp();
  }
  /// Few columns at a time, for registers are full.
  template <int kSteps, int kPieces, class A, class B>
  FOVEA_DEVICE static void multiply_seen_by_columns(Accumulator (&sum)[kPieces], int row, const A& a, const B& b) {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      Accumulator one[1][1] = {{sum[j]}};
      multiply_seen<S, kSteps>(one, row, 0, a, [&](int k, int column) { return b(k, 8U * j + column % 8U); });
      sum[j] = one[0][0];
    }
  }

  // ---- slopes

  FOVEA_DEVICE float* slope_part(int head) const {
    const HopperWalk<S>& walk = state.walk;
    return p.slope_parts + ((i64{walk.sequence.batch} * p.q_heads + head) * p.key_blocks + walk.key_block) * S.warps +
           warp_id() - 8;
  }
  FOVEA_DEVICE void clear_slope_parts() const {
    if (lane_id() != 0) return;
    for (int h = 0; h < p.group; ++h) *slope_part(state.walk.kv_head * p.group + h) = 0.0F;
  }
  /// The next step is known here once its q has arrived.
  FOVEA_DEVICE void add_slope(u32 n, float part, float& sum) const {
    sum += part;
    state.q.await_full(n + 1);
    const Step &now = step(n), &next = step(n + 1);
    if (next.exists && next.head == now.head) return;
    for (int lane = 1; lane < kWarp; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
    if (lane_id() == 0) *slope_part(now.head) = sum;
    sum = 0.0F;
  }

  // ---- the end

  /// Through shared memory, in the place of k and v, which nobody still reads, by each warp for its keys.
  FOVEA_DEVICE void store(const Sums& sums) const {
    const HopperWalk<S>& walk = state.walk;
    const Sequence& sequence = walk.sequence;
    place(at.k(), sums.dk[0], p.scale);
    place(at.v(), sums.dv[0], S.dropout ? p.keep_scale : 1.0F);
    __syncwarp();
    const int first = key() + warp_key(), keys = sequence.kv_rows - first;
    write_rows<S.head_dim>(at.k(), keys, p.head_dim, p.dk, sequence.kv_row(p.dk, first, walk.kv_head));
    write_rows<S.head_dim_v>(at.v(), keys, p.head_dim_v, p.dv, sequence.kv_row(p.dv, first, walk.kv_head));
  }
  template <int kPieces>
  FOVEA_DEVICE void place(u32 tile, const Accumulator (&sum)[kPieces], float factor) const {
    const int lane = lane_id();
    const auto word = [&](int c, int h) {
      return pack<S.type>(sum[c].x[2 * h] * factor, sum[c].x[2 * h + 1] * factor);
    };
#pragma unroll
    for (int c = 0; c < kPieces; c += 2) {
      store_matrices(swizzled(tile + c / 8 * kKeyPanel, warp_key() + lane % 16, c % 8 + lane / 16), word(c, 0),
                     word(c, 1), word(c + 1, 0), word(c + 1, 1));
    }
  }
  template <int kDim>
  FOVEA_DEVICE void write_rows(u32 tile, int keys, int dim, const RowView& view, char* to) const {
    constexpr int kPieces = kDim / 8;
#pragma unroll 4
    for (int i = lane_id(); i < 16 * kPieces; i += kWarp) {
      const int row = i / kPieces, column = i % kPieces * 8;
      if (row >= keys || column >= dim) continue;
      write_piece(to + row * view.row + column * kBytes<S.type>,
                  load_shared_16(element<S.block_n>(tile, warp_key() + row, column)), (dim - column) * kBytes<S.type>,
                  view.aligned);
    }
  }
};

}  // namespace fovea::cuda
