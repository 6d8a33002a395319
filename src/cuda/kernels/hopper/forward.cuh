#pragma once

#include "cuda/kernels/hopper/epilogue.cuh"
#include "cuda/kernels/hopper/softmax.cuh"

// The forward on Hopper (FlashAttention-3, 2407.08608): one warpgroup has Q, K and V copied into rings, the others make
// S = Q Kᵀ and O += P V of 64 rows each.  While the tensor cores have the scores of a tile and the values of the one
// before, S of which is weighed by then, nobody waits.
namespace fovea::cuda {

/// What the threads of a block share.
template <ForwardSm90Spec S>
struct State {
  Ring<S.q_stages> q;
  Ring<S.stages> k, v;
  Work<S> work[S.q_stages];
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

template <ForwardSm90Spec S>
struct Producer {
  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  u32 n = 0, keys = 0;  // tiles of rows, and of keys, so far

  static constexpr u32 kMeeting = 1;  // the producers' barrier
  FOVEA_DEVICE static int thread() { return static_cast<int>(threadIdx.x % 128); }
  FOVEA_DEVICE static bool leads() { return thread() == 0; }

  /// By one thread, or by all where they copy by hand.
  FOVEA_DEVICE void run() {
    if (p.by_engine && !leads()) return;
    const Tickets tickets{p.ticket, static_cast<u32>(p.tiles)};
    if (leads()) tickets.begin();
    int tile = static_cast<int>(blockIdx.x);
#pragma unroll 1
    for (;;) {
      Work<S>& work = state.work[state.q.place(n)];
      state.q.await_empty(n);
      if (leads()) {
        for (;; tile = tickets.next()) {
          if (tile >= p.tiles) {
            work.rows.rows = 0;  // nothing is left
            break;
          }
          work.find(p, tile);
          if (work.rows.left() > 0) break;
        }
      }
      share();
      if (work.rows.left() <= 0) break;
      load(work);
      if (leads()) tile = tickets.next();
      ++n;
    }
    if (leads()) state.q.full[state.q.place(n)].arrive();
  }

  FOVEA_DEVICE void share() const {
    if (!p.by_engine) meet(kMeeting, 128);
  }

  FOVEA_DEVICE void load(const Work<S>& work) {
    const Sequence& sequence = work.sequence;
    const int place = state.q.place(n);
    const RowPlace q_place{sequence.q_begin + work.rows.first, work.rows.first_head, sequence.batch};
    if (p.by_engine) {
      load_panels<block_m(S), S.head_dim>(at.q(place), p.q_map, state.q.full[place], of_map(q_place), Keep::kNo);
    } else {
      by_hand<block_m(S), S.head_dim>(at.q(place), state.q.full[place], work.rows.left(), p.q,
                                      sequence.q_row(p.q, work.rows.first, work.rows.first_head));
    }
    // K a tile ahead of V, last ones first.
#pragma unroll 1
    for (int tile = work.tiles.end - 1; tile >= work.tiles.begin - 1; --tile) {
      if (tile >= work.tiles.begin) load_keys<S.head_dim>(work, tile, keys, state.k, at.k(0), p.k_map, p.k);
      if (tile < work.tiles.end - 1) load_keys<S.head_dim_v>(work, tile + 1, keys - 1, state.v, at.v(0), p.v_map, p.v);
      ++keys;
    }
    if (!work.tiles.empty()) --keys;
  }

  template <int kDim>
  FOVEA_DEVICE void load_keys(const Work<S>& work, int tile, u32 n, Ring<S.stages>& ring, u32 first,
                              const TensorMap& map, const RowView& view) const {
    const Sequence& sequence = work.sequence;
    const int place = ring.place(n), key = tile * S.block_n;
    const u32 to = first + static_cast<u32>(place * tile_bytes(S.block_n, kDim));
    ring.await_empty(n);
    if (p.by_engine) {
      load_panels<S.block_n, kDim>(to, map, ring.full[place],
                                   of_map({sequence.kv_begin + key, work.kv_head, sequence.batch}), Keep::kYes);
    } else {
      by_hand<S.block_n, kDim>(to, ring.full[place], sequence.band.seqlen_kv - key, view,
                               sequence.kv_row(view, key, work.kv_head));
    }
  }

  /// Packed sequences are one to the copy engine.
  FOVEA_DEVICE RowPlace of_map(RowPlace place) const {
    if (p.cu_seqlens_q.data != nullptr) place.batch = 0;
    return place;
  }

  template <int kRows, int kDim>
  FOVEA_DEVICE void by_hand(u32 to, Barrier& full, int rows, const RowView& view, const char* from) const {
    load_by_hand<128, S.type, kRows, kDim>(to, thread(), rows, view.aligned, from, view.row);
    fence_engine();
    share();
    if (leads()) full.arrive();
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

  FOVEA_DEVICE int warp_row() const { return group * kGroupRows + warp_id() % 4 * 16; }

  FOVEA_DEVICE void run() {
    if (S.turns && group == S.warpgroups - 1) pass_turn();
#pragma unroll 1
    for (;; ++n) {
      state.q.await_full(n);
      const Work<S>& work = state.work[state.q.place(n)];
      if (work.rows.left() <= 0) break;
      attend(work);
      fence_engine();  // O has been where the next Q comes
      __syncwarp();
      state.q.release(n);
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
    const Interval own = own_tiles(work);
    Soft soft;
    Out o;
    Scores s;
    Weights weights;
    skip(work.tiles.end - own.end);
    if (own.empty()) {
#pragma unroll
      for (int x = 0; x < 4 * Epilogue<S>::kD; ++x) o[0][x / 4].x[x % 4] = 0.0F;
    } else {
      int tile = own.end - 1;
      first_tile(work, rules, soft, s, weights, unit, tile);
      int add = 0;
#pragma unroll 1
      for (--tile; tile >= own.begin; --tile, add = 1) next_tile(work, rules, soft, s, weights, o, unit, tile, add);
      last_values(weights, o, add);
      skip(own.begin - work.tiles.begin);
    }
    const Epilogue<S> epilogue{p, work, rules, at.q(state.q.place(n)), warp_row()};
    epilogue.finish(o, soft.reference, soft.sum);
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

  FOVEA_DEVICE Sight sight_of(const Work<S>& work, int tile) const {
    const int key = tile * S.block_n;
    return {work.reach[group].tile({key, key + S.block_n}), S.mask ? TileState::kPartial : TileState::kFull};
  }

  FOVEA_DEVICE void first_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& s, Weights& weights,
                               float unit, int tile) {
    await_turn();
    issue_scores(s);
    pass_turn();
    Fetched entries;
    rules.fetch(entries, warp_row(), tile * S.block_n);
    await_products<0>();
    pin(s[0]);
    state.k.release(keys);
    rules.finish(s, warp_row(), tile * S.block_n, sight_of(work, tile), entries);
    rules.hide_by_bias(s, entries);
    float total[2], rescale[2];
    soft.raise(s, unit, rescale);
    soft.weigh(s, weights, total, unit, rules, warp_row(), tile * S.block_n, work.stream);
    soft.add(total);
    ++keys;
  }

  /// S of this tile while P V of the one before is made.
  FOVEA_DEVICE void next_tile(const Work<S>& work, const Rules& rules, Soft& soft, Scores& s, Weights& weights, Out& o,
                              float unit, int tile, int add) {
    const int row = warp_row(), key = tile * S.block_n;
    await_turn();
    issue_scores(s);
    issue_values(o, weights, keys - 1, add);
    pass_turn();
    Fetched entries;
    rules.fetch(entries, row, key);
    await_products<1>();
    pin(s[0]);
    state.k.release(keys);
    const auto values_done = [&] {
      await_products<0>();
      pin(o[0]);
      pin(weights);
      state.v.release(keys - 1);
    };
    if constexpr (!S.hold) values_done();
    rules.finish(s, row, key, sight_of(work, tile), entries);
    Weights held;
    Weights& next = S.hold ? held : weights;
    float total[2];
    soft.weigh(s, next, total, unit, rules, row, key, work.stream);
    if (Soft::outgrown(total)) {
      if constexpr (S.hold) await_products<0>(), pin(o[0]);
      rules.hide_by_bias(s, entries);
      float rescale[2];
      soft.raise(s, unit, rescale);
      soft.sum[0] *= rescale[0], soft.sum[1] *= rescale[1];
#pragma unroll
      for (int x = 0; x < 4 * Epilogue<S>::kD; ++x) o[0][x / 4].x[x % 4] *= rescale[x % 4 / 2];
      soft.weigh(s, next, total, unit, rules, row, key, work.stream);
    }
    soft.add(total);
    if constexpr (S.hold) {
      values_done();
      move(weights, held);
    }
    ++keys;
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
    constexpr u32 kWarps = S.warpgroups * 4;
    state.q.begin(kWarps), state.k.begin(kWarps), state.v.begin(kWarps);
    fence_barriers();
    fence_engine();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0);
  if (group == 0) {
    give_registers<producer_registers(S)>();
    Producer<S>{p, state, {shared_address(shared)}}.run();
  } else {
    take_registers<consumer_registers(S)>();
    Consumer<S>{p, state, {shared_address(shared)}, group - 1}.run();
  }
}

}  // namespace fovea::cuda
