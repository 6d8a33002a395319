#pragma once

#include "cuda/kernels/hopper/backward_state.cuh"

// The warpgroup that has a block's keys copied once and then the rows on its walk, with their statistics: by one thread
// through the copy engine, or by hand.
namespace fovea::cuda {

/// kByEngine: the copy engine can read q, k, v and dout.
template <BackwardSpec S, bool kByEngine>
struct BackwardProducer {
  const BackwardSm90Params& p;
  BackwardState<S>& state;
  const BackwardLayout<S> at;

  static constexpr u32 kMeeting = 1;                                         // the producers' barrier
  static constexpr Keep kKeepRows = S.ends_dq ? Keep::kAwhile : Keep::kYes;  // dq_sum comes first where L2 can hold it
  /// Whether this thread asks the copy engine.  With a mask that is one of the second warp, for the first one, which
  /// looks the mask up, is as busy as who computes.
  FOVEA_DEVICE static bool leads() { return threadIdx.x == (S.mask ? kWarp : 0); }

  /// The threads that produce: one, with a bias a warp, with a mask two; all where the copy engine cannot read a
  /// tensor.
  FOVEA_DEVICE u32 hands() const {
    return !kByEngine || S.bias && !p.bias_by_engine ? 128 : S.mask ? 2 * kWarp : S.bias ? kWarp : 1;
  }
  FOVEA_DEVICE void run() {
    if (kByEngine && threadIdx.x >= hands()) {
      if (S.deterministic && warp_id() == 3) pass_turns();
      return;
    }
    if (S.goes_on && !state.has_task(0)) return;
    HopperWalk<S>& walk = state.walk;
    load_keys_of_block(0);
    if (walk.keeps()) walk.begin(p);  // meanwhile
    u32 first = 0;                    // step of the keys
    int task = 0;
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      if (walk.keeps()) walk.write(p, static_cast<int>(n), state.step(n - 1), n == first);
      share();
      const Step& step = state.step(n);
      const int place = state.q.place(n);
      Barrier& q = state.q.full[place];
      const auto exists = [&] { return kByEngine && !S.mask && !S.bias ? step.exists : uniform(step.exists); };
      if (S.goes_on && !exists() && walk.writes()) state.ask_for_task(p, task + 1);  // which takes a while
      state.q.await_empty(n);
      if (S.mask && walk.writes()) q.arrive();  // for the step; who leads arrives for the rest
      if (!exists()) {
        if constexpr (S.holds_dq || S.goes_on) pass_places(n);
        if (leads()) q.arrive();
        if constexpr (S.goes_on) {
          if (!go_on_to_task(++task, n)) return;
          first = n + 1;
          continue;
        }
        if (!S.holds_dq || state.last_keys(walk.key_block)) return;
        go_on_to_next_keys();
        first = n + 1;
        continue;
      }
      if (looks_up()) continue;  // to write the next step while others copy
      const int words = S.mask && step.mask == TileState::kPartial ? BackwardLayout<S>::kShared.words_stage : 0;
      load_rows_of<S.head_dim>(step, at.q(place), at.log2_lse(place), q, p.q_map, p.q, p.log2_lse, p.head_dim, words);
      if (words > 0 && leads()) load_bytes(at.words(place), words_of(step), words, q);
      if constexpr (S.bias) load_bias(step, fresh(n));  // whose places take no registers before
      const u32 again = fresh(n);                       // nor have these
      state.dout.await_empty(again);
      const int dout_place = state.dout.place(again);
      load_rows_of<S.head_dim_v>(step, at.dout(dout_place), at.delta(dout_place), state.dout.full[dout_place],
                                 p.dout_map, p.dout, p.delta, p.head_dim_v);
    }
  }

  /// Whether this thread copies nothing.
  FOVEA_DEVICE bool looks_up() const { return S.mask && warp_id() == 0 && hands() == 2 * kWarp; }

  /// Passes the turns of steps whose dq has been added, by a warp of its own: a release waits for all that was sent.
  FOVEA_DEVICE void pass_turns() const {
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      state.turns.await_full(n);
      const bool exists = uniform(state.step(n).exists);
      const i64 slot = state.step(n).slot;
      state.turns.release(n);
      if (!exists) return;
      if (lane_id() == 0) Turn::pass(p, slot);
    }
  }

  /// Step n has no rows, but takes a place in every ring.  Consumers release the keys once q is announced, and not
  /// before the places were awaited here.
  FOVEA_DEVICE void pass_places(u32 n) const {
    state.dout.await_empty(n);
    if (leads()) state.dout.full[state.dout.place(n)].arrive();
    if constexpr (S.bias) {
      state.bias.await_empty(n);
      if (!p.bias_by_engine) {
        state.bias.announce(n);
      } else if (leads()) {
        state.bias.full[state.bias.place(n)].arrive();
      }
    }
    share();
  }
  FOVEA_DEVICE void go_on_to_next_keys() const {
    HopperWalk<S>& walk = state.walk;
    share();
    if (leads()) ++walk.key_block;
    share();
    load_keys_of_block(walk.key_block);
    if (walk.keeps()) walk.begin(p);
  }

  /// False where there is none.
  FOVEA_DEVICE bool go_on_to_task(int i, u32 n) const {
    if (!state.has_task(i)) return false;
    HopperWalk<S>& walk = state.walk;
    share();
    if (walk.writes()) walk.go_on(p, state.task(i));
    share();
    load_keys_of_block(i);
    if (walk.keeps()) walk.begin(p);
    if (state.ends_dq(i - 1)) state.q.await_empty(n + S.stages);  // behind the keys' places it has all memory
    return true;
  }

  /// Of a task, which may have none, or of a tile of keys.
  FOVEA_DEVICE void load_keys_of_block(int of) const {
    const int rank = rank_of_block<S>();
    Barrier &k = state.k.full[state.k.place(of)], &v = state.v.full[state.v.place(of)];
    if constexpr (S.holds_dq || S.goes_on) state.k.await_empty(of);
    if (S.goes_on && state.walk.key_block < 0) {
      state.v.await_empty(of);
      if (leads()) k.arrive(), v.arrive();
      return;
    }
    load_keys<S.head_dim>(rank, at.k(of), k, p.k_map, p.k, p.head_dim);
    if constexpr (S.holds_dq || S.goes_on) state.v.await_empty(of);
    load_keys<S.head_dim_v>(rank, at.v(of), v, p.v_map, p.v, p.head_dim_v);
    if constexpr (shares_keys(S))
      load_keys<dq_panels(S) * kPanelColumns>(1 - rank, at.other_k(), state.other_k, p.k_map, p.k, p.head_dim,
                                              rank * (panels_of(S.head_dim) / 2) * kPanelColumns);
  }

  FOVEA_DEVICE void share() const {
    if constexpr (!kByEngine || S.mask || S.bias) meet(kMeeting, hands());
  }

  /// Packed sequences are one tensor to the copy engine.
  FOVEA_DEVICE int batch() const { return p.cu_seqlens_q.data != nullptr ? 0 : state.walk.sequence.batch; }

  /// Loads the keys, or values, of the block of this rank in the cluster.
  template <int kDim>
  FOVEA_DEVICE void load_keys(int rank, u32 to, Barrier& full, const TensorMap& map, const RowView& view, int dim,
                              int first_column = 0) const {
    constexpr int kKeys = keys_of_block(S);
    const HopperWalk<S>& walk = state.walk;
    const Sequence& sequence = walk.sequence;
    const int key = first_key_of_block<S>(walk.key_block, rank);
    if constexpr (kByEngine) {
      if (leads())
        load_panels<kKeys, kDim>(to, map, full, RowPlace{sequence.kv_begin + key, walk.head_of_keys(p), batch()},
                                 Keep::kNo, 0, first_column);
    } else {
      copy<kKeys, kDim>(to, sequence.band.seqlen_kv - key, dim - first_column, view,
                        sequence.kv_row(view, key, walk.head_of_keys(p)) + first_column * kBytes<S.type>);
      fence_engine();
      share();
      if (leads()) full.arrive();
    }
  }

  template <int kDim>
  FOVEA_DEVICE void load_rows_of(const Step& step, u32 to, u32 statistics_to, Barrier& full, const TensorMap& map,
                                 const RowView& view, const float* statistics, int dim, int more = 0) const {
    constexpr int kBytesOfStatistics = BackwardLayout<S>::kShared.statistics_of_tile;
    const int row = step.tile * S.block_m;
    const Sequence& sequence = state.walk.sequence;
    if constexpr (kByEngine) {
      if (!leads()) return;
      load_panels<S.block_m, kDim>(to, map, full, RowPlace{sequence.q_begin + row, step.head, batch()}, kKeepRows,
                                   kBytesOfStatistics + more);
    } else {
      copy<S.block_m, kDim>(to, sequence.band.seqlen_q - row, dim, view, sequence.q_row(view, row, step.head));
      fence_engine();
      share();
      if (!leads()) return;
      full.arrive_with(kBytesOfStatistics + more);
    }
    load_bytes(statistics_to, statistics + step.slot * S.block_m, kBytesOfStatistics, full);
  }

  /// A mask's words of a tile.
  FOVEA_DEVICE const u32* words_of(const Step& step) const {
    const WordView& view = p.mask_words;
    const HopperWalk<S>& walk = state.walk;
    const int word = first_key_of_block<S>(walk.key_block, rank_of_block<S>()) / 32;
    return view.data + walk.sequence.batch * view.batch + step.head * view.head +
           (step.tile * view.row * view.count + word) * S.block_m;
  }

  /// Loads the bias of a tile.
  FOVEA_DEVICE void load_bias(const Step& step, u32 n) const {
    const int place = state.bias.place(n), row = step.tile * S.block_m,
              key = first_key_of_block<S>(state.walk.key_block, rank_of_block<S>());
    Barrier& full = state.bias.full[place];
    state.bias.await_empty(n);
    if (!p.bias_by_engine) {
      copy_bias(at.bias(place), row, key, step.head);
      state.bias.announce(n);  // by each warp for its part
    } else if (leads()) {
      load_bias_panels<S.block_m, keys_of_block(S), S.bias_type>(
          at.bias(place), p, full, key, {row, step.head, state.walk.sequence.batch}, Keep::kAwhile);
      full.arrive();
    }
  }
  /// By threads.  Past the last row or key the last one is read: such entries are hidden anyway.
  FOVEA_DEVICE void copy_bias(u32 to, int row, int key, int head) const {
    constexpr int kSize = kBytes<S.bias_type>, kOf = 4 / kSize, kWords = keys_of_block(S) / kOf, kTogether = 4;
    const Sequence& sequence = state.walk.sequence;
    const int word = static_cast<int>(threadIdx.x) % kWords, j = key + word * kOf, last = sequence.kv_rows - 1;
    const char* const column = sequence.entry(p.bias, 0, math::smaller(j, last), head);
    const i64 next = j < last ? p.bias.key : 0;
#pragma unroll 1
    for (int r = static_cast<int>(threadIdx.x) / kWords * kTogether; r < S.block_m; r += 128 / kWords * kTogether) {
      u32 words[kTogether];
#pragma unroll
      for (int x = 0; x < kTogether; ++x) {
        const char* const from = column + math::smaller(row + r + x, sequence.q_rows - 1) * p.bias.query;
        if constexpr (kSize == 4) {
          words[x] = *reinterpret_cast<const u32*>(from);
        } else {
          words[x] = *reinterpret_cast<const u16*>(from) | u32{*reinterpret_cast<const u16*>(from + next)} << 16;
        }
      }
#pragma unroll
      for (int x = 0; x < kTogether; ++x)
        store_shared(swizzled(to + word / 32 * (S.block_m * kPanelRowBytes), r + x, word % 32 / 4) + word % 4 * 4,
                     words[x]);
    }
  }

  template <int kRows, int kDim>
  FOVEA_DEVICE void copy(u32 to, int rows, int dim, const RowView& view, const char* from) const {
    load_by_hand<128, kRows, kDim>(
        to, static_cast<int>(threadIdx.x), dim * kBytes<S.type>, view.aligned, [&](int r) { return r < rows; },
        [&](int r) { return from + r * view.row; });
  }
};

}  // namespace fovea::cuda
