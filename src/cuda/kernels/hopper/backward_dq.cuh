#pragma once

#include "cuda/kernels/hopper/backward_end.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"

// The warpgroup of the backward that makes dq = dS K from the others' dS in shared memory: all columns for 64 rows, or
// a panel of them at a time, which each warp adds to dq_sum.  In a pair of blocks each makes half of the panels, for
// the keys of both.  Where a block has all keys of its rows, threads sum their parts of dq in shared memory.
namespace fovea::cuda {

template <BackwardSpec S>
struct BackwardDq {
  using Pieces = typename Backward<S>::Dq;
  static constexpr bool kPairs = shares_keys(S);
  static constexpr int kBlocks = blocks_of_cluster(S), kKeys = keys_of_block(S);
  static constexpr int kColumns = dq_columns(S), kPanels = (S.head_dim + kColumns - 1) / kColumns,
                       kKeyPanel = kKeys * kPanelRowBytes;
  static constexpr int kPieces = kColumns / 8;  // of 16 rows of a product
  static constexpr int kStages = BackwardLayout<S>::kShared.dq_stages;
  static constexpr bool kOne = kPanels == 1 && S.block_m == kGroupRows;  // a step is one product
  /// Of a step's two products the first is added from registers, so that the second can begin sooner and only half as
  /// much waits for the copy engine, which adds the second, if it is as wide.  In turns, which wait until all is added,
  /// the engine, which takes longer, has the first one.
  static constexpr bool kBothWays =
      !kPairs && !kOne && (kPanels == 1 ? !S.deterministic : S.deterministic || S.head_dim % kPanelColumns == 0);
  static constexpr int kUnroll = S.deterministic ? 2 : 1;  // spares registers, and is twice the text
  /// So many pieces of the engine's are added from registers.
  static constexpr int kDirect = S.deterministic ? 0 : kBothWays ? 2 : kPanels == 1 && kPieces > 8 ? 4 : 0;
  /// Turns are passed so many steps later, while a product is made: additions take longer than one.
  static constexpr u32 kLag = kOne && !kPairs ? 2 : 1;
  /// Pieces of 16 rows that are contiguous in dq_sum.
  static constexpr int kRun =
      Pieces::kM == 1 ? kPieces : math::smaller(Pieces::kN & -Pieces::kN, kDirect > 0 ? kDirect : kPieces);
  static constexpr u32 kMeeting = 4;  // this warpgroup's barrier

  const BackwardSm90Params& p;
  BackwardState<S>& state;
  const BackwardLayout<S> at;
  const int task = 0;  // of the block that goes on

  FOVEA_DEVICE static int warp() { return warp_id() % 4; }
  FOVEA_DEVICE const Step& step(u32 n) const { return state.step(n); }

  FOVEA_DEVICE void run() const {
    if constexpr (S.holds_dq) {
      hold();
    } else if constexpr (S.goes_on) {
      u32 n = 0, sent = 0;
#pragma unroll 1
      for (int i = 0; state.has_task(i); ++i, ++n) {
        if (state.ends_dq(i)) {
          state.ds.await_full(n);
          state.k.release(i);
          state.ds.release(n);
          pass(BackwardEnd<S>::kMemoryIsFree, 3 * 128);
        } else {
          BackwardDq{p, state, at, i}.add_all(n, sent);
        }
      }
    } else {
      u32 n = 0, sent = 0;
      add_all(n, sent);
    }
  }

 private:
  using Sum = Accumulator[1][kPieces];

  /// From step n on, to the one behind the last; so many pieces have been sent before.
  FOVEA_DEVICE void add_all(u32& n, u32& sent) const {
    if constexpr (S.ends_dq) BackwardEnd<S>{p}.await_place(state.task(task).turn);
    if constexpr (kPairs) state.other_k.wait(0);
#pragma unroll 1
    for (;; ++n) {
      state.ds.await_full(n);
      if (!uniform(step(n).exists)) break;
      const bool spoiled = !kPairs && uniform(state.spoiled[n & 1]);
      if constexpr (kPairs) make_half(n);
#pragma unroll(kUnroll)
      for (int row = 0; row < (kPairs ? 0 : S.block_m); row += kGroupRows) {
#pragma unroll(kUnroll)
        for (int panel = 0; panel < kPanels; ++panel, ++sent) {
          Sum dq;
          const bool first = row + panel == 0;
          make(dq, n, row, panel, spoiled, first, kOne || !first);
          if (kBothWays && first != S.deterministic) {
            add<kPieces>(dq[0], state.dq_tile(n), row + warp() * 16, panel);
          } else {
            add<kDirect>(dq[0], state.dq_tile(n), row + warp() * 16, panel, kBothWays ? n : sent);
          }
        }
      }
      if (spoiled) {
        meet(kMeeting, 128);
        state.spoiled[n & 1] = false;
      }
      if constexpr (!kPairs) state.ds.release(n);
    }
    if constexpr (S.goes_on) state.k.release(task), state.ds.release(n);
    if constexpr (S.deterministic) {
      for (u32 left = math::smaller(kLag, n) + 1; left > 0; --left) end_turn<0>(n + 1 - left);
    } else if (!kPairs && lane_id() == 0) {
      await_additions<0>();
    }
    if constexpr (S.ends_dq) {
      meet(kMeeting, 128);
      if (threadIdx.x % 128 == 0) BackwardEnd<S>{p}.count(state.task(task).turn);
    }
  }

  // ---- dq is held in shared memory

  FOVEA_DEVICE void hold() const {
    u32 begun = 0;  // tiles of rows, a bit each
#pragma unroll 1
    for (u32 n = 0;; ++n) {
      state.ds.await_full(n);
      if (!uniform(step(n).exists)) {
        if (uniform(state.last_keys(step(n).stage))) break;
        state.k.release(step(n).stage);
        state.ds.release(n);
        continue;
      }
      const int tile = tile_of(step(n).head, step(n).tile);
      const bool spoiled = uniform(state.spoiled[n & 1]);
#pragma unroll 1
      for (int row = 0; row < S.block_m; row += kGroupRows) {
        Sum dq;
        make(dq, n, row, 0, spoiled, false, false);
        add(dq[0], part(tile, row), (begun >> tile & 1) != 0);
      }
      begun |= 1U << tile;
      if (spoiled) {
        meet(kMeeting, 128);
        state.spoiled[n & 1] = false;
      }
      state.ds.release(n);
    }
    write(begun);
  }

  FOVEA_DEVICE int tile_of(int head, int tile) const {
    return (head - state.walk.kv_head * p.group) * p.row_blocks + tile;
  }
  /// Of a warp's 16 rows, piece by piece as accumulators lie.
  FOVEA_DEVICE u32 part(int tile, int row) const { return at.held(tile) + (row / 16 + warp()) * dq_piece_bytes(S); }

  FOVEA_DEVICE static void add(Accumulator (&dq)[kPieces], u32 part, bool begun) {
    const u32 mine = part + lane_id() * 16;
    if (begun) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const uint4 sum = load_shared_16(mine + j * 512);
        dq[j].x[0] += __uint_as_float(sum.x), dq[j].x[1] += __uint_as_float(sum.y);
        dq[j].x[2] += __uint_as_float(sum.z), dq[j].x[3] += __uint_as_float(sum.w);
      }
    }
#pragma unroll
    for (int j = 0; j < kPieces; ++j) store_shared_four(mine + j * 512, dq[j]);
  }

  /// Writes dq of all rows; zeros where a row sees no key.
  FOVEA_DEVICE void write(u32 begun) const {
    __syncwarp();
    const Sequence& sequence = state.walk.sequence;
#pragma unroll 1
    for (int h = 0; h < p.group; ++h) {
#pragma unroll 1
      for (int row = warp() * 16; row < sequence.q_rows; row += kGroupRows) {
        const int tile = h * p.row_blocks + row / S.block_m;
        const u32 part = at.held(tile) + row % S.block_m / 16 * dq_piece_bytes(S);
        const bool there = (begun >> tile & 1) != 0;
#pragma unroll 1
        for (int i = lane_id(); i < kColumns; i += kWarp) {
          float4 sums[4] = {};
#pragma unroll
          for (int a = 0; a < 4 && there; ++a) {
            const uint4 four = load_shared_16(part + i / 8 * 512 + i % 8 * 64 + a * 16);
            sums[a] = {__uint_as_float(four.x), __uint_as_float(four.y), __uint_as_float(four.z),
                       __uint_as_float(four.w)};
          }
          if (i / 8 * 8 < p.head_dim)
            write_dq<S, true>(p, sequence, row + i % 8, state.walk.kv_head * p.group + h, i / 8 * 8, sums);
        }
      }
    }
  }

  // ---- dq is added to dq_sum

  /// Has step n's turn passed once its additions are done, by a producing warp where one has nothing to do; kOpen:
  /// later additions of the copy engine.
  template <int kOpen>
  FOVEA_DEVICE void end_turn(u32 n) const {
    if (lane_id() == 0) await_additions<kOpen>();
    if (p.by_engine && (!S.bias || p.bias_by_engine)) {
      state.turns.await_empty(n);
      state.turns.announce(n);
    } else {
      meet(kMeeting, 128);
      if (threadIdx.x % 128 == 0 && step(n).exists) Turn::pass(p, step(n).slot);
    }
  }
  FOVEA_DEVICE void await_turn(u32 n) const { Turn::await<kBlocks>(p, step(n)); }

  /// This block's panels; of an odd number the blocks of a pair make the middle one by turns.  Added from registers,
  /// but in turns all but the last by the engine, where there is room.
  FOVEA_DEVICE void make_half(u32 n) const {
    const int half = kPanels / 2 + static_cast<int>(kPanels % 2 & ~n);
    const int first = rank_in_pair() == 0 ? 0 : half, end = rank_in_pair() == 0 ? half : kPanels;
    if (first == end) {
      state.ds.template release<true>(n);
      if constexpr (S.deterministic) {
        if (n > 0) end_turn<0>(n - 1);
        await_turn(n);
      }
    }
#pragma unroll 1
    for (int panel = first; panel < end; ++panel) {
      Sum dq;
      const bool last = panel + 1 == end;
      make(dq, n, 0, panel, false, panel == first, last);
      if (last) state.ds.template release<true>(n);
      if (kStages > 0 && !last) {
        add<0>(dq[0], state.dq_tile(n), warp() * 16, panel);
      } else {
        add<kPieces>(dq[0], state.dq_tile(n), warp() * 16, panel);
      }
    }
  }

  /// A panel of 64 rows; first, last: of the step.
  FOVEA_DEVICE void make(Sum& dq, u32 n, int row, int panel, bool spoiled, bool first, bool last) const {
    pin(dq[0]);
    fence_products();
#pragma unroll
    for (int other = 0; other < kBlocks; ++other) {
      multiply_tiles_by_columns<S.type, kKeys, S.block_m, kColumns>(
          dq[0], matrix_at(ds(n, other) + row * kPanelRowBytes, 16), matrix_at(keys(panel, other), kKeyPanel), other);
    }
    close_products();
    if constexpr (S.deterministic) {
      if (last && n >= kLag) {
        if (kPairs && kPanels % 2 == 1 && first) {
          end_turn<0>(n - kLag);
        } else {
          end_turn<1>(n - kLag);
        }
      }
      if (first) await_turn(n);
    }
    await_products<0>();
    pin(dq[0]);
    if (spoiled || (kPairs && !all_finite(dq[0]))) make_seen(dq[0], n, row + warp() * 16, panel);
  }
  /// dS and K of this block and of the other one.
  FOVEA_DEVICE u32 ds(u32 n, int other) const { return other != 0 ? at.other_ds(n) : at.ds(n); }
  FOVEA_DEVICE u32 keys(int panel, int other) const {
    const int first = rank_of_block<S>() * (kPanels / 2);
    return other != 0 ? at.other_k() + (panel - first) * kKeyPanel : at.k(task) + panel * kKeyPanel;
  }

  /// In a pair, dq itself shows whether something hidden was not finite, for a block knows its own keys alone.
  FOVEA_DEVICE static bool all_finite(const Accumulator (&dq)[kPieces]) {
    float sum = 0.0F;
#pragma unroll
    for (const Accumulator& c : dq) {
#pragma unroll
      for (float x : c.x) sum += x * 0.0F;
    }
    return !__any_sync(kAllLanes, !(sum == 0.0F));
  }
  /// The same term by term, without hidden entries.
  FOVEA_DEVICE void make_seen(Accumulator (&dq)[kPieces], u32 n, int row, int panel) const {
#pragma unroll
    for (int j = 0; j < kPieces; ++j) {
      Accumulator one[1][1] = {};
#pragma unroll 1
      for (int other = 0; other < kBlocks; ++other) {
        multiply_seen<kKeys>(
            one, row, kPairs ? fresh(8 * j) : 8 * j,
            [&](int k, int r) { return read_shared<S.type>(element<S.block_m>(ds(n, other), r, k)); },
            [&](int k, int column) { return read_shared<S.type>(element<kKeys>(keys(panel, other), k, column)); });
      }
      dq[j] = one[0][0];
    }
  }

  /// The first piece of 16 rows of a tile.
  FOVEA_DEVICE float* sum_of(i64 slot, int row) const {
    return p.dq_sum + slot * (S.block_m * S.head_dim) + Pieces::piece(row / 16, 0);
  }
  /// The first pieces of a product from registers, the others through shared memory by the copy engine.
  template <int kFromRegisters>
  FOVEA_DEVICE void add(const Accumulator (&dq)[kPieces], i64 slot, int row, int panel, u32 sent = 0) const {
    float* const sum = sum_of(slot, row);
    const int first = kPanels == 1 ? 0 : panel * kPieces;
    const int pieces =
        S.head_dim % kColumns == 0 ? kPieces : math::smaller(kColumns, S.head_dim - panel * kPanelColumns) / 8;
#pragma unroll
    for (int j = 0; j < kFromRegisters; ++j) {
      if (j < pieces) reduce<S.ends_dq>(sum + Pieces::piece(0, first + j), dq[j]);
    }
    if constexpr (kFromRegisters < kPieces) {
      const u32 from = at.dq(warp(), sent);
      if (lane_id() == 0) await_additions_read<kStages - 1>();
      __syncwarp();
#pragma unroll
      for (int j = kFromRegisters; j < kPieces; ++j) store_shared_four(from + j * 512 + lane_id() * 16, dq[j]);
      fence_engine();
      __syncwarp();
      if (lane_id() != 0) return;
#pragma unroll
      for (int j = kFromRegisters; j < kPieces; j += kRun) {
        if (j < pieces)
          add_floats(sum + Pieces::piece(0, first + j), from + j * 512, math::smaller(kRun, pieces - j) * 512,
                     S.ends_dq ? Keep::kYes : Keep::kAwhile);
      }
      close_additions();
    }
  }

  FOVEA_DEVICE static void store_shared_four(u32 address, const Accumulator& c) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(c.x[0]), "f"(c.x[1]), "f"(c.x[2]),
                 "f"(c.x[3])
                 : "memory");
  }
};

}  // namespace fovea::cuda
