#pragma once

#include "cuda/kernels/hopper/backward_state.cuh"
#include "cuda/kernels/hopper/gradient_columns.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// What the backward's two warpgroups of keys have in common, whether each has 64 keys of its own or both share them.
namespace fovea::cuda {

template <BackwardSpec S>
struct BackwardOwner {
  using Columns = GradientColumns<S>;
  using Entries = typename Columns::Entries;
  using Packed = typename Columns::Packed;
  static constexpr int kKeys = keys_of_block(S);
  static constexpr int kKeyPanel = kKeys * kPanelRowBytes, kRowPanel = S.block_m * kPanelRowBytes;
  static constexpr u32 kMeetings = 2;  // the barriers of both warpgroups, from this one on

  const BackwardSm90Params& p;
  BackwardState<S>& state;
  const BackwardLayout<S> at;
  const int first_key;  // of the warpgroup, in the block
  const int task = 0;   // the block's task, or tile of keys, at hand

  FOVEA_DEVICE const Step& step(u32 n) const { return state.step(n); }
  FOVEA_DEVICE int key(u32 n) const { return first_key_of_block<S>(state.key_block(n), rank_of_block<S>()); }
  FOVEA_DEVICE int warp_key() const { return first_key + warp_id() % 4 * 16; }
  FOVEA_DEVICE u32 meeting() const { return kMeetings + static_cast<u32>(first_key / kGroupRows); }

  FOVEA_DEVICE bool full(u32 n) const { return uniform(step(n).template full<S.mask>()); }

  // ---- the walk

  /// Whether S of the next tile is asked for before this one ends.  Where dq is held or columns are few, tiles without
  /// options wait for each product; others keep shared memory or their instructions busy, or have no registers for it.
  static constexpr bool kAsksAhead =
      is_bare(S) && !S.bias && (S.holds_dq || (S.head_dim <= 48 && S.head_dim_v <= S.head_dim));

  /// Whether there is a tile, and whether all of it is seen; of one that was asked for, its scores, once they are
  /// there.
  struct Ahead {
    bool exists, full;
    Entries scores;
  };
  FOVEA_DEVICE void look_ahead(Ahead& ahead, u32 n) const {
    state.q.await_full(n);
    ahead.exists = uniform(step(n).exists);
    ahead.full = full(n);
    if constexpr (kAsksAhead) issue_scores(ahead.scores, n);  // where there is none, of what lies there
  }
  /// Calls self.tile for tile after tile from n on, with whether some entry may be hidden; returns the end.  A `self`
  /// that looks ahead fills in `ahead` for the next tile.
  template <class Self, class Sums>
  FOVEA_DEVICE u32 gather(const Self& self, Sums& sums, u32 n = 0) const {
    Ahead ahead;
    if constexpr (Self::kLooksAhead) look_ahead(ahead, n);
#pragma unroll 1
    for (;; ++n) {
      if constexpr (!Self::kLooksAhead) {
        state.q.await_full(n);
        ahead.exists = uniform(step(n).exists);
      }
      if (!ahead.exists) {
        if constexpr (kAsksAhead) await_products<0>();
        break;
      }
      const bool whole = Self::kLooksAhead ? ahead.full : full(n);          // known by looking ahead, or asked now
      if constexpr (!shares_keys(S) && (S.bias || S.softcap || S.alibi)) {  // one text for much of both kinds
        self.tile(n, !whole, ahead, sums);
      } else if constexpr (!shares_keys(S)) {
        if (whole) {
          self.tile(n, false, ahead, sums);
        } else {
          self.tile(n, true, ahead, sums);
        }
      } else if (whole) {
        self.template tile<false>(n, sums);
      } else {
        self.template tile<true>(n, sums);
      }
    }
    return n;
  }
  /// Tells the warpgroup of dq that there is no tile n.
  FOVEA_DEVICE void end_walk(u32 n) const {
    state.ds.await_empty(n);
    if constexpr (shares_keys(S)) {
      if (threadIdx.x % 128 == 0) state.ds.full[n & 1].arrive();
    } else {
      state.ds.announce(n);
    }
  }
  /// After the walk: waits until K is read no more.
  FOVEA_DEVICE void await_end(u32 n) const { state.ds.await_empty(n + 1); }

  // ---- products, which are issued here and awaited elsewhere

  FOVEA_DEVICE u64 keys_at(u32 tile) const { return matrix_at(tile + first_key * kPanelRowBytes, 16); }
  FOVEA_DEVICE void issue_scores(Entries& s, u32 n) const {
    pin(s[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim, kKeys, S.block_m>(s[0], keys_at(at.k(task)),
                                                           matrix_at(at.q(state.q.place(n)), 16));
    close_products();
  }
  /// dP starts from −delta, unless dropout or another operation comes before the subtraction.
  FOVEA_DEVICE void issue_dp(Entries& dp, u32 n) const {
    state.dout.await_full(n);
    if constexpr (Columns::kDeltaFirst) Columns::begin_with_delta(dp, at.delta(state.dout.place(n)));
    pin(dp[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim_v, kKeys, S.block_m>(
        dp[0], keys_at(at.v(task)), matrix_at(at.dout(state.dout.place(n)), 16), Columns::kDeltaFirst ? 1 : 0);
    close_products();
  }
  /// dv from Pᵀ and dout, dk from dSᵀ and q; 128 columns at a time, for ptxas takes no product of more registers than
  /// the launch gave a thread.
  template <int kDim, int kFirst = 0>
  FOVEA_DEVICE static void add_columns(Accumulator (&sum)[kDim / 8], const Packed& entries, u32 rows) {
    constexpr int kColumns = math::smaller(kDim - kFirst, 128);
    auto& part = reinterpret_cast<Accumulator(&)[kColumns / 8]>(sum[kFirst / 8]);
    multiply_by_columns<S.type, S.block_m, kColumns>(
        part, entries, matrix_at(rows + kFirst / kPanelColumns * kRowPanel, kRowPanel), 1);
    if constexpr (kFirst + kColumns < kDim) add_columns<kDim, kFirst + kColumns>(sum, entries, rows);
  }
  template <int kDim>
  FOVEA_DEVICE static void issue_sum(Accumulator (&sum)[kDim / 8], Packed& entries, u32 rows) {
    pin(sum);
    pin(entries);
    fence_products();
    add_columns<kDim>(sum, entries, rows);
    close_products();
  }

  // ---- a tile

  FOVEA_DEVICE RowMap<Packing::kNone> rows_of(const Step& at) const {
    return {at.tile * S.block_m, state.walk.sequence.q_rows, at.head, 1};
  }
  FOVEA_DEVICE int lane_key(u32 n) const { return key(n) + warp_key() + lane_id() / 4; }

  /// Which entries are seen, found while the scores are made.
  FOVEA_DEVICE void see(Columns& columns, u32 n) const {
    if (S.mask && uniform(step(n).mask == TileState::kPartial)) {
      columns.look_up(at.words(state.q.place(n)) + warp_key() / 16 * (kWarp * 4));
    } else {
      columns.see_all();
    }
    if (uniform(!step(n).full_band)) columns.keep_to_band();
  }

  FOVEA_DEVICE bool bias_hides(const Columns& columns, u32 n) const {
    if constexpr (S.bias_type == Type::kFloat32) return true;  // it may, and is not asked
    state.bias.await_full(n);
    return uniform(meet_any(
        meeting(), 128,
        columns.hides_some(at.bias(state.bias.place(n)), fresh(warp_key()), p.bias_by_engine && p.bias.query == 0)));
  }
  /// To scores; behind that its place is free.
  FOVEA_DEVICE void add_bias(const Columns& columns, Entries& s, u32 n) const {
    if constexpr (S.bias) {
      state.bias.await_full(n);
      columns.add_bias(s, at.bias(state.bias.place(n)), fresh(warp_key()), p.bias_by_engine && p.bias.query == 0);
      state.bias.release(n);
    }
  }

  /// The address of a lane's part of dS, [row][key].
  FOVEA_DEVICE u32 part_of_ds(u32 n) const {
    const int lane = fresh(lane_id());
    return swizzled(at.ds(n) + first_key / kPanelColumns * kRowPanel, lane / 16 * 8 + lane % 8,
                    warp_id() % 4 * 2 + lane / 8 % 2);
  }
  /// Stores it there for the other warpgroups.
  FOVEA_DEVICE void put(const Packed& ds, u32 n) const {
    const u32 mine = part_of_ds(n);
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) store_matrices_transposed(mine + k * 16 * kPanelRowBytes, ds[k]);
  }

  /// dv from Pᵀ and dout, dk from dSᵀ and q, term by term, without hidden entries.
  template <int kPieces>
  FOVEA_DEVICE void add_seen_columns(Accumulator (&sum)[kPieces], u32 entries, u32 rows) const {
    constexpr int kAtOnce = shares_keys(S) ? kPieces : 1;  // who has both sums has no registers for more
#pragma unroll
    for (int first = 0; first < kPieces; first += kAtOnce) {
      const int key = fresh(warp_key() + lane_id() / 4), column = fresh(lane_id() % 4 * 2);
#pragma unroll 1
      for (int k = 0; k < S.block_m; ++k) {
        const float factors[2] = {read_shared<S.type>(element<S.block_m>(entries, k, key)),
                                  read_shared<S.type>(element<S.block_m>(entries, k, key + 8))};
#pragma unroll
        for (int j = first; j < first + kAtOnce; ++j) {
          const u32 two = load_shared(element<S.block_m>(rows, k, 8 * j + column));
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (!is_hidden(factors[e / 2])) sum[j].x[e] += factors[e / 2] * widen_half<S.type>(two, e % 2);
          }
        }
      }
    }
  }

  // ---- slopes

  FOVEA_DEVICE float* slope_part(int head, u32 n) const {
    const HopperWalk<S>& walk = state.walk;
    const int warp = shares_keys(S) ? rank_of_block<S>() * 4 + warp_id() % 4 : warp_id() - 8;
    return p.slope_parts +
           ((i64{walk.sequence.batch} * p.q_heads + head) * p.key_blocks + state.key_block(n)) * S.warps + warp;
  }
  FOVEA_DEVICE void clear_slope_parts(u32 n = 0) const {
    if (lane_id() != 0) return;
    for (int h = 0; h < p.group; ++h) *slope_part(state.walk.kv_head * p.group + h, n) = 0.0F;
  }
  /// The next step is known here once its q has arrived.
  FOVEA_DEVICE void add_slope(u32 n, float part, float& sum) const {
    sum += part;
    state.q.await_full(n + 1);
    const Step &now = step(n), &next = step(n + 1);
    if (next.exists && next.head == now.head) return;
    for (int lane = 1; lane < kWarp; lane *= 2) sum += __shfl_xor_sync(kAllLanes, sum, lane);
    if (lane_id() == 0) *slope_part(now.head, n) = sum;
    sum = 0.0F;
  }

  // ---- the end

  /// By each warp for its keys: through shared memory that is read no more, to `view`, or from registers to `parts`.
  /// kWhole: which has room for all columns of the block's keys, not just for a panel of the warpgroup's.
  template <int kDim, bool kWhole = true>
  FOVEA_DEVICE void store_sum(u32 tile, const Accumulator (&sum)[kDim / 8], float factor, int dim, const RowView& view,
                              const RowView& parts, u32 n = 0) const {
    const Sequence& sequence = state.walk.sequence;
    if constexpr (S.split_gqa) {
      const int row = key(n) + warp_key() + lane_id() / 4;
      char* const to = row_of_keys(parts, row) + lane_id() % 4 * 8;
#pragma unroll
      for (int x = 0; x < kDim / 4; ++x) {
        const int c = x / 2, h = x % 2;
        if (row + 8 * h < sequence.kv_rows && c * 8 < dim)
          *reinterpret_cast<float2*>(to + 8 * h * parts.row + c * 32) = {sum[c].x[2 * h] * factor,
                                                                         sum[c].x[2 * h + 1] * factor};
      }
      return;
    }
    const int first = key(n) + warp_key();
    leave<kDim, kWhole ? kDim : kPanelColumns>(tile, sum, factor, sequence.kv_rows - first, dim, view,
                                               row_of_keys(view, first));
  }
  FOVEA_DEVICE char* row_of_keys(const RowView& view, int row) const {
    if constexpr (!S.goes_on) return state.walk.sequence.kv_row(view, row, state.walk.kv_head);
    const BlockTask& of = state.task(task);  // the walk may have left
    return view.data + of.batch * view.batch + i64{row} * view.row + of.kv_head * view.head;
  }
  template <int kDim, int kAtOnce, int kFirst = 0>
  FOVEA_DEVICE void leave(u32 tile, const Accumulator (&sum)[kDim / 8], float factor, int keys, int dim,
                          const RowView& view, char* to) const {
    constexpr int kColumns = math::smaller(kDim - kFirst, kAtOnce);
    place<kFirst / 8, kColumns / 8>(tile, sum, factor);
    __syncwarp();
    write_rows<kColumns>(tile, keys, dim - kFirst, view, to + kFirst * kBytes<S.type>);
    if constexpr (kFirst + kColumns < kDim) {
      __syncwarp();
      leave<kDim, kAtOnce, kFirst + kColumns>(tile, sum, factor, keys, dim, view, to);
    }
  }
  /// kCount pieces of columns, from kFirst on.
  template <int kFirst, int kCount, int kPieces>
  FOVEA_DEVICE void place(u32 tile, const Accumulator (&sum)[kPieces], float factor) const {
    const int lane = lane_id();
    const auto word = [&](int c, int h) {
      return pack<S.type>(sum[kFirst + c].x[2 * h] * factor, sum[kFirst + c].x[2 * h + 1] * factor);
    };
#pragma unroll
    for (int c = 0; c < kCount; c += 2) {
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
                  load_shared_16(element<kKeys>(tile, warp_key() + row, column)), (dim - column) * kBytes<S.type>,
                  view.aligned);
    }
  }
};

}  // namespace fovea::cuda
