#pragma once

#include "cuda/kernels/hopper/state.cuh"

// The warpgroup that has Q, K and V copied: by one thread through the copy engine, or by hand.
namespace fovea::cuda {

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
      load_by_hand<128, kRows, kDim>(to, thread(), rows, kDim * bytes_of(S.type), view.aligned, from(), view.row);
      fence_engine();
      share();
      if (leads()) full.arrive();
    }
  }
};

}  // namespace fovea::cuda
