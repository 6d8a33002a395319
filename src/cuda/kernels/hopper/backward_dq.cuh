#pragma once

#include "cuda/kernels/hopper/backward_state.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// The warpgroup of the backward that makes dq = dS K of what the others leave of dS: a panel of columns at a time for
// 64 rows, which each warp adds to dq_sum.
namespace fovea::cuda {

template <BackwardSpec S>
struct BackwardDq {
  using Pieces = typename Backward<S>::Dq;
  static constexpr int kColumns = dq_columns(S), kKeyPanel = S.block_n * kPanelRowBytes;
  /// Pieces of 16 rows that lie in a row: where a warp has more rows, as many as begin nowhere else.
  static constexpr int kRun = Pieces::kM == 1 ? kColumns / 8 : math::smaller(Pieces::kN & -Pieces::kN, kColumns / 8);
  static constexpr u32 kMeeting = 4;  // this warpgroup's barrier

  const BackwardSm90Params& p;
  BackwardState<S>& state;
  const BackwardLayout<S> at;

  FOVEA_DEVICE static int warp() { return warp_id() % 4; }
  FOVEA_DEVICE const Step& step(u32 n) const { return state.step(n); }

  FOVEA_DEVICE void run() const {
    u32 n = 0, sent = 0;
#pragma unroll 1
    for (;; ++n) {
      state.ds.await_full(n);
      if (!uniform(step(n).exists)) break;
      const bool spoiled = uniform(state.spoiled[n & 1]);
#pragma unroll 1
      for (int row = 0; row < S.block_m; row += kGroupRows) {
#pragma unroll 1
        for (int panel = 0; panel < panels_of(S.head_dim); ++panel, ++sent) {
          make(n, row, panel, spoiled, sent);
          if (S.deterministic && n > 0 && row + panel == 0) pass_turn<1>(n - 1);
        }
      }
      if (spoiled) {
        meet(kMeeting, 128);
        state.spoiled[n & 1] = false;
      }
      state.ds.release(n);
    }
    if (S.deterministic && n > 0) {
      pass_turn<0>(n - 1);
    } else if (lane_id() == 0) {
      await_additions<0>();
    }
  }

 private:
  /// Of a step whose additions are done but for the kOpen last pieces.  The copy engine has the next step's first piece
  /// by then, so that it is never idle.
  template <int kOpen>
  FOVEA_DEVICE void pass_turn(u32 n) const {
    if (lane_id() == 0) await_additions<kOpen>();
    meet(kMeeting, 128);
    if (threadIdx.x % 128 == 0) Turn{step(n)}.pass(p);
  }

  /// Of 64 rows, a panel.
  FOVEA_DEVICE void make(u32 n, int row, int panel, bool spoiled, u32 sent) const {
    const u32 ds = at.ds(n), keys = at.k() + panel * kKeyPanel;
    Accumulator dq[1][kColumns / 8];
    pin(dq[0]);
    fence_products();
    multiply_tiles_by_columns<S.type, S.block_n, S.block_m, kColumns>(dq[0], matrix_at(ds + row * kPanelRowBytes, 16),
                                                                      matrix_at(keys, kKeyPanel));
    close_products();
    if (S.deterministic && row + panel == 0) Turn{step(n)}.await(p);
    await_products<0>();
    pin(dq[0]);
    const int first = row + warp() * 16;
    if (spoiled) make_seen(dq[0], ds, keys, first);
    add(dq[0], step(n).slot, first, panel, sent);
  }

  /// Term by term of what is seen.
  FOVEA_DEVICE static void make_seen(Accumulator (&dq)[kColumns / 8], u32 ds, u32 keys, int row) {
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      Accumulator one[1][1] = {};
      multiply_seen<S, S.block_n>(
          one, row, 8 * j, [&](int k, int r) { return element<S.block_m>(ds, r, k); },
          [&](int k, int column) { return element<S.block_n>(keys, k, column); });
      dq[j] = one[0][0];
    }
  }

  /// Through shared memory by the copy engine.
  FOVEA_DEVICE void add(const Accumulator (&dq)[kColumns / 8], i64 slot, int row, int panel, u32 sent) const {
    float* const sum = p.dq_sum + slot * (S.block_m * S.head_dim);
    const int pieces = math::smaller(kColumns, S.head_dim - panel * kPanelColumns) / 8;
    const u32 from = at.dq(warp(), sent);
    if (lane_id() == 0) await_additions_read<kDqStages - 1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) store_shared_four(from + j * 512 + lane_id() * 16, dq[j]);
    fence_engine();
    __syncwarp();
    if (lane_id() != 0) return;
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += kRun) {
      if (j < pieces)
        add_floats(sum + Pieces::piece(row / 16, panel * (kPanelColumns / 8) + j), from + j * 512,
                   math::smaller(kRun, pieces - j) * 512);
    }
    close_additions();
  }

  FOVEA_DEVICE static void store_shared_four(u32 address, const Accumulator& c) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]),
                 "f"(c.x[3])
                 : "memory");
  }
};

}  // namespace fovea::cuda
