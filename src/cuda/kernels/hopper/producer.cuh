#pragma once

#include "cuda/kernels/hopper/state.cuh"

// The warpgroup that copies Q, K and V.  With the copy engine one warp issues the copies of keys and values while
// another finds the next tile of rows and its Q; without it all threads do one after the other.
namespace fovea::cuda {

/// kByEngine: the copy engine can read q, k and v.
template <ForwardSm90Spec S, bool kByEngine>
struct Producer {
  const ForwardSm90Params& p;
  State<S>& state;
  const Layout<S> at;
  u32 keys = 0;  // tiles of keys so far

  static constexpr u32 kMeeting = 1;  // the producers' barrier
  static constexpr int kHands = State<S>::kHands;
  static constexpr int kEarly = 1;  // the next rows are claimed when at most so many tiles of keys are left to load
  FOVEA_DEVICE static int thread() { return static_cast<int>(threadIdx.x % 128); }
  FOVEA_DEVICE static bool leads() { return kByEngine ? lane_id() == 0 : thread() == 0; }

  FOVEA_DEVICE void run() {
    int tile = static_cast<int>(blockIdx.x);
    if constexpr (!kByEngine) {
#pragma unroll 1
      for (u32 n = 0; find(n, tile); ++n) load(n);
    } else if (thread() / kWarp == 0) {
      if (S.mask || leads()) load_all();
    } else if (thread() / kWarp == 1 && leads()) {
#pragma unroll 1
      for (u32 n = 0; find(n, tile); ++n) state.late.wait(n & 1);
    }
  }

  FOVEA_DEVICE Work<S>& work_of(u32 n) const { return state.work[n % State<S>::kWorks]; }

  /// Claims the n-th tile of rows and starts the copies of its Q; false where there is none.
  FOVEA_DEVICE bool find(u32 n, int& tile) const {
    Work<S>& work = work_of(n);
    if (leads()) {
      if (n > 0) tile = Tickets::next(p, tile);
      if (!work.find(p, tile, state.packed)) {
        work.rows = {};
        Tickets::end(p, tile, p.cu_seqlens_q.data == nullptr ? p.tiles : state.packed.first * (S.split ? p.splits : 1));
      }
      if constexpr (kByEngine) state.known.arrive();
    }
    share();
    const Sequence& sequence = work.sequence;
    const int place = n % S.q_stages;
    if (work.rows.left() <= 0) {
      for (auto& ring : state.q) {
        ring.await_empty(n);
        if (leads()) ring.full[place].arrive();
      }
      return false;
    }
#pragma unroll
    for (int part = 0; part < q_parts(S); ++part) {
      auto& ring = state.q[part];
      const int down = part * q_rows(S);
      ring.await_empty(n);
      load_tile<q_rows(S), S.head_dim>(
          at.q(place, part), ring.full[place], p.q_map, place_of_rows(work, down, sequence.batch), Keep::kNo, p.q,
          [&](int r) { return work.rows.has(down + r); },
          [&](int r) { return sequence.q_row(p.q, work.rows.query(down + r), work.rows.head(down + r)); });
    }
    return true;
  }

  FOVEA_DEVICE void share() const {
    if constexpr (!kByEngine) meet(kMeeting, kHands);
  }

  /// By one thread, or with a mask, which a whole warp looks up, by one warp.
  FOVEA_DEVICE void load_all() {
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      state.known.wait(n & 1);
      if (work_of(n).rows.left() <= 0) break;
      load(n);
    }
  }

  /// Loads keys and values of the n-th tile of rows, K a tile ahead of V.  The next rows are claimed late, so that all
  /// blocks end together, but early enough that nothing waits for them.
  FOVEA_DEVICE void load(u32 n) {
    const Work<S>& work = work_of(n);
    bool late = false;
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
      if constexpr (kByEngine) {
        if (!late && (!there || walk.now().tile < work.tiles.begin + kEarly)) {
          if (leads()) state.late.arrive();
          late = true;
        }
      }
      if (walk.any_before()) load_values(work, walk.before(), keys - 1);
      if (!there) break;
    }
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
    load_tile<S.block_n, kDim>(
        to, full, map, RowPlace{sequence.kv_begin + key, work.kv_head, sequence.batch}, Keep::kYes, view,
        [&](int j) { return key + j < sequence.band.seqlen_kv; },
        [&](int j) { return sequence.kv_row(view, key + j, work.kv_head); });
  }

  /// `view`, has(r) and row_at(r) are for copies without the engine.
  template <int kRows, int kDim, class Place, class Has, class RowAt>
  FOVEA_DEVICE void load_tile(u32 to, Barrier& full, const TensorMap& map, Place place, Keep keep, const RowView& view,
                              const Has& has, const RowAt& row_at) const {
    if constexpr (kByEngine) {
      if (p.cu_seqlens_q.data != nullptr) place.batch = 0;  // packed sequences are one tensor to the engine
      if (leads()) load_panels<kRows, kDim>(to, map, full, place, keep);
    } else {
      load_by_hand<kHands, kRows, kDim>(to, thread(), kDim * bytes_of(S.type), view.aligned, has, row_at);
      fence_engine();
      share();
      if (leads()) full.arrive();
    }
  }
};

}  // namespace fovea::cuda
