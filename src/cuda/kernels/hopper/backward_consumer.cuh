#pragma once

#include "cuda/kernels/hopper/backward_state.cuh"
#include "cuda/kernels/hopper/gradient_columns.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// A warpgroup of the backward: it owns 64 of the block's keys, whose dk and dv stay in its registers, and makes dq of
// half of the rows, or of the columns, for all 128.  Sᵀ of the next rows is made while dq of these leaves.
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
  using DqPieces = typename Backward<S>::Dq;
  static constexpr int kKeyPanel = S.block_n * kPanelRowBytes, kRowPanel = S.block_m * kPanelRowBytes;
  static constexpr int kDqColumns = dq_columns(S);
  /// dPᵀ is made while S is weighed, or behind that where it takes registers of its own.
  static constexpr bool kLateDp = S.dropout || !kBareScores<S>;
  static constexpr u32 kMeeting = 2, kThreads = kBackwardConsumers * 128;  // the consumers' barrier

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

  FOVEA_DEVICE const Step& step(u32 n) const { return state.walk.steps[n & 3]; }
  FOVEA_DEVICE int key() const { return state.walk.key_block * S.block_n; }
  /// The warp's first key, and its first row of dq.
  FOVEA_DEVICE int warp_key() const { return group * kGroupRows + warp_id() % 4 * 16; }
  FOVEA_DEVICE int warp_row() const { return (shares_rows(S) ? group * kGroupRows : 0) + warp_id() % 4 * 16; }
  FOVEA_DEVICE int first_column() const { return shares_rows(S) ? 0 : group * kDqColumns; }

  FOVEA_DEVICE void run() const {
    Sums sums;
    typename Columns::Bits seen;
    u32 n = 0;
    clear(sums.dk), clear(sums.dv);
    pin(sums.dk[0]), pin(sums.dv[0]);
    if constexpr (S.alibi) clear_slope_parts();
    state.k.wait(0);
    state.v.wait(0);
    Entries s;
    issue_scores(s, 0);
    if constexpr (S.mask) look_up(seen, 0);
    await_products<0>();
    pin(s[0]);
#pragma unroll 1
    for (; step(n).exists; ++n) {
      if (!S.bias && step(n).template full<S.mask>()) {  // a bias may hide what it likes
        tile<false>(n, s, seen, sums);
      } else {
        tile<true>(n, s, seen, sums);
      }
    }
    meet(kMeeting, kThreads);
    if constexpr (S.deterministic) pass_turn(n);
    store(sums);
  }

  // ---- products, issued and not awaited

  FOVEA_DEVICE u64 keys_at(u32 tile) const { return matrix_at(tile + group * kGroupRows * kPanelRowBytes, 16); }
  FOVEA_DEVICE void issue_scores(Entries& s, u32 n) const {
    state.q.await_full(n);
    pin(s[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim, S.block_n, S.block_m>(s[0], keys_at(at.k()),
                                                               matrix_at(at.q(state.q.place(n)), 16));
    close_products();
  }
  FOVEA_DEVICE void issue_dp(Entries& dp, u32 n) const {
    state.dout.await_full(n);
    pin(dp[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim_v, S.block_n, S.block_m>(dp[0], keys_at(at.v()),
                                                                 matrix_at(at.dout(state.dout.place(n)), 16));
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
  FOVEA_DEVICE void issue_dq(Accumulator (&dq)[kDqColumns / 8], u32 n) const {
    const u32 ds = at.ds(n) + (shares_rows(S) ? group * kGroupRows * kPanelRowBytes : 0);
    pin(dq);
    fence_products();
    multiply_tiles_by_columns<S.type, S.block_n, S.block_m, kDqColumns>(dq, matrix_at(ds, 16),
                                                                        matrix_at(dq_columns_at(), kKeyPanel));
    close_products();
  }
  /// Of K, those that the warpgroup's part of dq has.
  FOVEA_DEVICE u32 dq_columns_at() const { return at.k() + (shares_rows(S) ? 0 : group * kKeyPanel); }

  // ---- a tile of rows

  /// kHides: some entry may be hidden.  Where what is hidden is not finite, sums are made term by term of what is seen.
  template <bool kHides>
  FOVEA_DEVICE void tile(u32 n, Entries& s, typename Columns::Bits& seen, Sums& sums) const {
    const Step& now = step(n);
    const int place = state.q.place(n);
    const i64 slot = now.slot;
    const RowMap<false> rows = rows_of(now);
    const typename Columns::Rules rules{p, state.walk.sequence, rows};
    Columns columns{rules, lane_key(), S.dropout ? uniform(now.stream) : math::DropoutStream{}, seen, {}, {}};
    Entries dp;
    Packed weights, kept, ds;
    Packed& of_values = S.dropout ? kept : weights;
    bool spoiled = false;
    if constexpr (!kLateDp) issue_dp(dp, n);
    float check = columns.template weigh<kHides>(s, at.log2_lse(place), now.full_band);
    columns.pack(weights, s);
    if constexpr (S.dropout) columns.pack_kept(kept, s);
    if constexpr (kLateDp) issue_dp(dp, n);
    if constexpr (!kHides) issue_sum<S.head_dim_v>(sums.dv[0], of_values, at.dout(place));
    await_products<kHides ? 0 : 1>();
    pin(dp[0]);
    check += columns.template differentiate<kHides>(dp, weights, at.delta(place));
    if constexpr (S.alibi) add_slope(n, columns.slope_part(dp), sums.slope);
    if constexpr (S.softcap) columns.pass_softcap(dp);
    columns.pack(ds, dp);
    if constexpr (!kHides) issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));  // hides what a shared dS costs
    put(ds, n);
    fence_engine();
    if constexpr (kHides) {
      spoiled = meet_any(kMeeting, kThreads, !(check == 0.0F));
      if (spoiled) {
        add_seen(n, place, of_values, sums);
      } else {
        issue_sum<S.head_dim_v>(sums.dv[0], of_values, at.dout(place));
        issue_sum<S.head_dim>(sums.dk[0], ds, at.q(place));
        await_products<0>();
        pin(sums.dv[0]), pin(sums.dk[0]);
      }
    } else {
      meet(kMeeting, kThreads);
      await_products<1>();
      pin(sums.dv[0]), pin(of_values);
    }
    if constexpr (S.deterministic) pass_turn(n);
    state.dout.release(n);

    Accumulator dq[1][kDqColumns / 8];
    issue_dq(dq[0], n);
    if constexpr (!kHides) {
      await_products<1>();
      pin(sums.dk[0]), pin(ds);
    }
    state.q.release(n);
    issue_scores(s, n + 1);
    if constexpr (S.mask) look_up(seen, n + 1);
    await_products<1>();
    pin(dq[0]);
    if (kHides && spoiled) make_seen_dq(dq, n);
    if constexpr (S.deterministic) Turn{step(n)}.await(p);
    add_dq(dq[0], slot);
    if constexpr (S.deterministic) __threadfence();
    await_products<0>();
    pin(s[0]);
  }

  FOVEA_DEVICE RowMap<false> rows_of(const Step& at) const {
    return {at.tile * S.block_m, state.walk.sequence.q_rows, at.head, 1};
  }
  FOVEA_DEVICE int lane_key() const { return key() + warp_key() + lane_id() / 4; }

  /// A tile ahead, while products are made.
  FOVEA_DEVICE void look_up(typename Columns::Bits& seen, u32 n) const {
    const Step& next = step(n);
    if (next.exists && next.mask == TileState::kPartial) {
      const RowMap<false> rows = rows_of(next);
      Columns::look_up(seen, {p, state.walk.sequence, rows}, lane_key());
    } else {
#pragma unroll
      for (u32& word : seen) word = ~0U;
    }
  }

  /// dS, [row][key], to where both warpgroups find it.
  FOVEA_DEVICE void put(const Packed& ds, u32 n) const {
    const int lane = lane_id();
    const u32 mine = swizzled(at.ds(n) + group * kRowPanel, lane / 16 * 8 + lane % 8, warp_id() % 4 * 2 + lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) store_matrices_transposed(mine + k * 16 * kPanelRowBytes, ds[k]);
  }

  FOVEA_DEVICE void add_dq(const Accumulator (&dq)[kDqColumns / 8], i64 slot) const {
    float* const sum = p.dq_sum + slot * (S.block_m * S.head_dim) + DqPieces::piece(warp_row() / 16, 0) * 128;
#pragma unroll
    for (int j = 0; j < kDqColumns / 8; ++j) {
      constexpr int kFirst = kDqColumns / 8;  // of the other warpgroup, where columns are shared out
      const int piece = shares_rows(S) || group == 0 ? DqPieces::piece(0, j) : DqPieces::piece(0, kFirst + j);
      if (first_column() + 8 * j < S.head_dim) reduce(sum + piece * 128, dq[j]);
    }
  }

  /// Of the step before the n-th, behind a barrier.
  FOVEA_DEVICE void pass_turn(u32 n) const {
    if (n > 0 && threadIdx.x == 128) Turn{step(n - 1)}.pass(p);
  }

  // ---- where something hidden is not finite

  /// By way of shared memory, where each warp finds what it has put there itself.  The other tile of dS has been read.
  FOVEA_DEVICE void add_seen(u32 n, int place, const Packed& weights, Sums& sums) const {
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
  FOVEA_DEVICE void make_seen_dq(Accumulator (&dq)[1][kDqColumns / 8], u32 n) const {
    clear(dq);
    multiply_seen_by_columns<S.block_n>(
        dq[0], warp_row(), [&](int k, int row) { return element<S.block_m>(at.ds(n), row, k); },
        [&](int k, u32 column) { return element<S.block_n>(dq_columns_at(), k, column); });
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
    const Walk<S>& walk = state.walk;
    return p.slope_parts + ((i64{walk.sequence.batch} * p.q_heads + head) * p.key_blocks + walk.key_block) * S.warps +
           warp_id() - 4;
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
    const Walk<S>& walk = state.walk;
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
