#pragma once

#include "cuda/kernels/hopper/epilogue.cuh"
#include "cuda/kernels/hopper/softmax.cuh"
#include "cuda/kernels/hopper/walk.cuh"

// The forward on Hopper (FlashAttention-3, 2407.08608): one warpgroup has Q, K and V copied into rings, the others make
// S = Q Kᵀ and O += P V of 64 rows each.  While the tensor cores have the scores of a tile and the values of the one
// before, S of which is weighed by then, nobody waits.
namespace fovea::cuda {

/// What the threads of a block share.
template <ForwardSm90Spec S>
struct State {
  Ring<S.q_stages> q;
  Ring<S.stages> k, v;
  static constexpr int kWorks = 4;  // the next one is known before Q is given back, and that before out is written
  Work<S> work[kWorks];
  Step steps[S.mask ? S.stages : 1];  // of the tiles of K in the ring
};

/// Where everything lies in shared memory.
template <ForwardSm90Spec S>
struct Layout {
  static constexpr int kK = tile_bytes(S.block_n, S.head_dim), kV = tile_bytes(S.block_n, S.head_dim_v);
  u32 base;
  FOVEA_DEVICE u32 q(int place) const { return base + place * q_tile_bytes(S); }
  FOVEA_DEVICE u32 k(int place) const { return q(S.q_stages) + place * kK; }
  FOVEA_DEVICE u32 v(int place) const { return k(S.stages) + place * kV; }
};

/// kByEngine: the copy engine can read q, k and v.
template <ForwardSm90Spec S, bool kByEngine>
struct Producer {
  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  u32 keys = 0;  // tiles of them so far
  int tile = 0;  // of rows, the last one claimed

  static constexpr u32 kMeeting = 1;  // the producers' barrier
  /// Tiles of keys, at most, that are left to load when the next tile of rows is claimed: it takes registers.
  static constexpr int kEarly = producer_registers(S) >= 56 ? 2 : 0;
  FOVEA_DEVICE static int thread() { return static_cast<int>(threadIdx.x % 128); }
  FOVEA_DEVICE static bool leads() { return thread() == 0; }

  /// By one thread; by a warp where it looks for what a mask leaves; by all where they copy by hand.
  FOVEA_DEVICE void run() {
    if (kByEngine && thread() >= (S.mask ? kWarp : 1)) return;
    tile = static_cast<int>(blockIdx.x);
#pragma unroll 1
    for (u32 n = 0; n == 0 || work_of(n - 1).rows.left() > 0; ++n) load_before(n);
  }

  FOVEA_DEVICE Work<S>& work_of(u32 n) const { return state.work[n % State<S>::kWorks]; }

  /// Finds the n-th tile of rows, and has its Q copied where there are places for two.
  FOVEA_DEVICE void prepare(u32 n) {
    Work<S>& work = work_of(n);
    if (leads()) {
      if (n > 0) tile = Tickets::next(p, tile);
      for (; tile < p.tiles; tile = Tickets::next(p, tile)) {
        work.find(p, tile);
        if (work.rows.left() > 0) break;
      }
      if (tile >= p.tiles) work.rows = {};  // nothing is left
    }
    share();
    if constexpr (S.q_stages > 1) load_q(n);
  }

  FOVEA_DEVICE void load_q(u32 n) const {
    const Work<S>& work = work_of(n);
    const Sequence& sequence = work.sequence;
    const int place = state.q.place(n);
    state.q.await_empty(n);
    if (work.rows.left() <= 0) {
      if (leads()) state.q.full[place].arrive();
      return;
    }
    load_tile<block_m(S), S.head_dim>(at.q(place), state.q.full[place], p.q_map,
                                      {sequence.q_begin + work.rows.first, work.rows.first_head, sequence.batch},
                                      Keep::kNo, work.rows.left(), p.q,
                                      [&] { return sequence.q_row(p.q, work.rows.first, work.rows.first_head); });
  }

  FOVEA_DEVICE void share() const {
    if constexpr (!kByEngine) {
      meet(kMeeting, 128);
    } else if constexpr (S.mask) {
      __syncwarp();
    }
  }

  /// The keys and values of the tile of rows before the n-th, K a tile ahead of V, and what there is to do for that
  /// one: late, so that all blocks end together, but not so late that anybody waits for it.
  FOVEA_DEVICE void load_before(u32 n) {
    const Work<S>& work = work_of(n - 1);
    bool prepared = false;
    Walk<S> walk(p, work);
#pragma unroll 1
    for (;; walk.advance(), ++keys) {
      const bool there = walk.there();
      if (there) {
        const int place = state.k.place(keys);
        state.k.await_empty(keys);
        if constexpr (S.mask) {
          if (leads()) state.steps[place] = walk.now();
        }
        load_keys<S.head_dim>(work, walk.now().tile, at.k(place), state.k.full[place], p.k_map, p.k);
      }
      if (walk.any_before()) load_values(work, walk.before(), keys - 1);
      if (!there) break;
      if constexpr (kEarly > 0) {
        if (!prepared && walk.now().tile < work.tiles.begin + kEarly) prepare(n), prepared = true;
      }
    }
    if (!prepared) prepare(n);
    if constexpr (S.q_stages == 1) load_q(n);
  }

  FOVEA_DEVICE void load_values(const Work<S>& work, int tile, u32 n) {
    const int place = state.v.place(n);
    state.v.await_empty(n);
    load_keys<S.head_dim_v>(work, tile, at.v(place), state.v.full[place], p.v_map, p.v);
  }

  template <int kDim>
  FOVEA_DEVICE void load_keys(const Work<S>& work, int tile, u32 to, Barrier& full, const TensorMap& map,
                              const RowView& view) const {
    const Sequence& sequence = work.sequence;
    const int key = tile * S.block_n;
    load_tile<S.block_n, kDim>(to, full, map, {sequence.kv_begin + key, work.kv_head, sequence.batch}, Keep::kYes,
                               sequence.band.seqlen_kv - key, view,
                               [&] { return sequence.kv_row(view, key, work.kv_head); });
  }

  /// `rows`, `view` and `from` are for copies by hand.
  template <int kRows, int kDim, class From>
  FOVEA_DEVICE void load_tile(u32 to, Barrier& full, const TensorMap& map, RowPlace place, Keep keep, int rows,
                              const RowView& view, const From& from) const {
    if constexpr (kByEngine) {
      if (p.cu_seqlens_q.data != nullptr) place.batch = 0;  // packed sequences are one
      if (leads()) load_panels<kRows, kDim>(to, map, full, place, keep);
    } else {
      load_by_hand<128, S.type, kRows, kDim>(to, thread(), rows, view.aligned, from(), view.row);
      fence_engine();
      share();
      if (leads()) full.arrive();
    }
  }
};

template <ForwardSm90Spec S>
struct Consumer {
  using Soft = Softmax<S>;
  using Scores = typename Soft::Scores;
  using Weights = typename Soft::Weights;
  using Rules = typename Soft::Rules;
  using Out = typename Epilogue<S>::Out;
  using Fetched = Entries<S, 1, Soft::kN>;

  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  const int group;  // of warps: which 64 rows
  u32 n = 0;        // tiles of rows so far
  u32 keys = 0;     // and of keys
  Interval full{};  // tiles of keys that these 64 rows see whole

  FOVEA_DEVICE int warp_row() const { return group * kGroupRows + warp_id() % 4 * 16; }

  FOVEA_DEVICE void run() {
    if (S.turns && group == S.warpgroups - 1) pass_turn();
#pragma unroll 1
    for (;; ++n) {
      state.q.await_full(n);
      const Work<S>& work = state.work[n % State<S>::kWorks];
      if (work.rows.left() <= 0) break;
      attend(work);
    }
  }

  // ---- turns: a warpgroup has its products issued before the next one issues its own

  static constexpr u32 kTurns = 2;  // the first one's barrier
  FOVEA_DEVICE void await_turn() const {
    if constexpr (S.turns) meet(kTurns + group, 256);
  }
  FOVEA_DEVICE void pass_turn() const {
    if constexpr (S.turns) pass(kTurns + (group + 1 == S.warpgroups ? 0 : group + 1), 256);
  }

  // ---- a tile of rows

  FOVEA_DEVICE void attend(const Work<S>& work) {
    const Rules rules{p, work.sequence, work.rows};
    const float unit = score_unit<S>(p);
    const Band::Reach& reach = work.reach[group];
    full = {(reach.all_begin + S.block_n - 1) / S.block_n, reach.all_end / S.block_n};
    Soft soft;
    Out o;
    if constexpr (S.mask) {
      attend_steps(work, rules, soft, o, unit);
      state.q.release(n);
    } else {
      attend_all(work, rules, soft, o, unit);
    }
    const Epilogue<S> epilogue{p, work, rules, warp_row()};
    epilogue.finish(o, soft.reference, soft.sum);
  }

  FOVEA_DEVICE static void clear(Out& o) {
#pragma unroll
    for (int x = 0; x < 4 * Epilogue<S>::kD; ++x) o[0][x / 4].x[x % 4] = 0.0F;
  }

  FOVEA_DEVICE void attend_all(const Work<S>& work, const Rules& rules, Soft& soft, Out& o, float unit) {
    const Interval own = own_tiles(work);
    skip(work.tiles.end - own.end);
    if (own.empty()) {
      state.q.release(n);
      return clear(o);
    }
    Scores s;
    Weights weights;
    Step step{own.end - 1, 0};
    first_tile(work, rules, soft, s, weights, o, unit, step);
    int add = 0;
#pragma unroll 1
    for (--step.tile; step.tile >= own.begin; --step.tile, add = 1)
      next_tile(work, rules, soft, s, weights, o, unit, step, add);
    state.q.release(n);
    last_values(weights, o, add);
    skip(own.begin - work.tiles.begin);
  }

  /// What the producer has found for a mask, in runs of tiles that these 64 rows see.
  FOVEA_DEVICE void attend_steps(const Work<S>& work, const Rules& rules, Soft& soft, Out& o, float unit) {
    clear(o);
    bool more = !work.tiles.empty();
#pragma unroll 1
    while (more) {
      Step step = await_step(more);
      if (sight_of(work, step).hidden()) {
        skip(1);
        continue;
      }
      Scores s;
      Weights weights;
      first_tile(work, rules, soft, s, weights, o, unit, step);
#pragma unroll 1
      while (more) {
        bool another;
        step = await_step(another);
        if (sight_of(work, step).hidden()) break;
        more = another;
        next_tile(work, rules, soft, s, weights, o, unit, step, 1);
      }
      last_values(weights, o, 1);
    }
  }
  FOVEA_DEVICE Step await_step(bool& more) const {
    state.k.await_full(keys);
    const Step step = state.steps[state.k.place(keys)];
    more = (step.seen & Step::kLast) == 0;
    return step;
  }

  /// Of the block's tiles of keys, those that these 64 rows see any of.
  FOVEA_DEVICE Interval own_tiles(const Work<S>& work) const {
    const Band::Reach& reach = work.reach[group];
    if (reach.any_end <= reach.any_begin) return {work.tiles.begin, work.tiles.begin};
    return {reach.any_begin / S.block_n, (reach.any_end - 1) / S.block_n + 1};
  }

  /// Tiles that only others see.
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
    return matrix_at(at.q(state.q.place(n)) + group * kGroupRows * kPanelRowBytes, 16);
  }
  FOVEA_DEVICE void issue_scores(Scores& s) const {
    state.k.await_full(keys);
    pin(s[0]);
    fence_products();
    multiply_by_rows<S.type, S.head_dim, block_m(S), S.block_n>(s[0], q_matrix(),
                                                                matrix_at(at.k(state.k.place(keys)), 16));
    close_products();
  }
  FOVEA_DEVICE void issue_values(Out& o, Weights& weights, u32 of, int add) const {
    state.v.await_full(of);
    pin(o[0]);
    pin(weights);
    fence_products();
    multiply_by_columns<S.type, S.block_n, S.head_dim_v>(
        o[0], weights, matrix_at(at.v(state.v.place(of)), S.block_n * kPanelRowBytes), add);
    close_products();
  }

  FOVEA_DEVICE static math::DropoutStream stream_of(const Work<S>& work) {
    return S.dropout ? uniform(work.stream) : math::DropoutStream{};
  }

  FOVEA_DEVICE Sight sight_of(const Work<S>& work, const Step& step) const {
    const int key = step.tile * S.block_n;
    return {full.contains(step.tile) ? TileState::kFull : work.reach[group].tile({key, key + S.block_n}),
            S.mask ? step.mask(group) : TileState::kFull};
  }

  /// Without values to be added meanwhile.
  FOVEA_DEVICE void first_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& s, Weights& weights, Out& o,
                               float unit, const Step& step) {
    const int row = warp_row(), key = step.tile * S.block_n;
    await_turn();
    issue_scores(s);
    pass_turn();
    Fetched entries;
    rules.fetch(entries, row, key);
    await_products<0>();
    pin(s[0]);
    state.k.release(keys);
    rules.finish(s, row, key, sight_of(work, step), entries);
    float total[2];
    raise(rules, soft, s, o, unit, entries, S.mask);
    soft.weigh(s, weights, total, unit, rules, row, key, stream_of(work));
    soft.add(total);
    ++keys;
  }

  /// S of this tile while P V of the one before is made.
  FOVEA_DEVICE void next_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& s, Weights& weights, Out& o,
                              float unit, const Step& step, int add) {
    const int row = warp_row(), key = step.tile * S.block_n;
    await_turn();
    issue_scores(s);
    issue_values(o, weights, keys - 1, add);
    pass_turn();
    Fetched entries;
    rules.fetch(entries, row, key);
    await_products<1>();
    pin(s[0]);
    state.k.release(keys);
    if constexpr (!S.hold) values_done(o, weights);
    rules.finish(s, row, key, sight_of(work, step), entries);
    Weights held;
    Weights& next = S.hold ? held : weights;
    float total[2];
    soft.weigh(s, next, total, unit, rules, row, key, stream_of(work));
    if (Soft::outgrown(total)) {
      if constexpr (S.hold) await_products<0>(), pin(o[0]);
      raise(rules, soft, s, o, unit, entries, true);
      soft.weigh(s, next, total, unit, rules, row, key, stream_of(work));
    }
    soft.add(total);
    if constexpr (S.hold) {
      values_done(o, weights);
      move(weights, held);
    }
    ++keys;
  }

  /// References of a tile's scores; sums and O, where there are any, move on to them.
  FOVEA_DEVICE void raise(const Rules& rules, Soft& soft, Scores& s, Out& o, float unit, const Fetched& entries,
                          bool begun) const {
    rules.hide_by_bias(s, entries);
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

  FOVEA_DEVICE void last_values(Weights& weights, Out& o, int add) {
    issue_values(o, weights, keys - 1, add);
    await_products<0>();
    pin(o[0]);
    state.v.release(keys - 1);
  }
};

/// Blocks: one a multiprocessor.
template <ForwardSm90Spec S>
__device__ void forward_sm90(const ForwardSm90Params& p) {
  extern __shared__ __align__(1024) char shared[];
  static_assert(sizeof(State<S>) <= kStateBytes);
  State<S>& state = *reinterpret_cast<State<S>*>(shared + shared_bytes(S) - kStateBytes);
  if (threadIdx.x == 0) {
    state.work[State<S>::kWorks - 1].tiles = {};  // what comes before the first tile of rows
    constexpr u32 kWarps = S.warpgroups * 4;
    state.q.begin(kWarps), state.k.begin(kWarps), state.v.begin(kWarps);
    fence_barriers();
    fence_engine();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  if (group == 0) {
    give_registers<producer_registers(S)>();
    if (p.by_engine) {
      Producer<S, true>{p, state, {shared_address(shared)}}.run();
    } else {
      Producer<S, false>{p, state, {shared_address(shared)}}.run();
    }
  } else {
    take_registers<consumer_registers(S)>();
    Consumer<S>{p, state, {shared_address(shared)}, group - 1}.run();
  }
}

}  // namespace fovea::cuda
