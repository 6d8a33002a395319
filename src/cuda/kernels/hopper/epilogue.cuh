#pragma once

#include "cuda/kernels/hopper/scheduler.cuh"
#include "cuda/kernels/row_end.cuh"

// From sums to out and lse, by each warp for its 16 rows.
namespace fovea::cuda {

/// Two of what `store_matrices` stores four of.
FOVEA_DEVICE void store_two_matrices(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

template <ForwardSm90Spec S>
struct Epilogue {
  static constexpr int kD = S.head_dim_v / 8;
  using Out = Accumulator[1][kD];
  using Rules = ScoreRules<S, false, AsTheyAre>;

  const ForwardSm90Params& p;
  const Work<S>& work;
  const Rules& rules;
  u32 tile;  // of Q, in whose place O goes
  int row;   // the warp's first, of the block

  /// Divides by the sums, adds sinks, writes out and lse.
  FOVEA_DEVICE void finish(Out& o, const float (&reference)[2], float (&sum)[2]) const {
    sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
    float factors[2];
    end_rows(reference, sum, factors);
    float check[2] = {};
#pragma unroll
    for (int x = 0; x < 4 * kD; ++x) {
      float& value = o[0][x / 4].x[x % 4];
      check[x % 4 / 2] += value * 0.0F;
      value *= factors[x % 4 / 2];
    }
    if (__any_sync(kAllLanes, factors[0] == 0.0F || factors[1] == 0.0F)) {  // NaN may stand where nothing was seen
#pragma unroll
      for (int x = 0; x < 4 * kD; ++x) {
        float& value = o[0][x / 4].x[x % 4];
        value = factors[x % 4 / 2] == 0.0F ? 0.0F : value;
      }
    }
    store(o);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) mend(h, factors[h] != 0.0F && quad_sum(check[h]) != 0.0F, reference[h], factors[h]);
  }

  /// Of the four lanes that share two rows, two end one each; the others do the same for nothing.
  FOVEA_DEVICE void end_rows(const float (&reference)[2], const float (&sum)[2], float (&factors)[2]) const {
    const int lane = lane_id(), h = lane % 2, mine = row + lane / 4 + 8 * h, head = work.rows.first_head;
    float factor = 0.0F;
    if (mine < work.rows.left()) {
      const RowEnd end = end_of_row<S>(p, head, h == 0 ? reference[0] : reference[1], h == 0 ? sum[0] : sum[1]);
      factor = end.empty ? 0.0F : end.factor;
      if (p.lse.data != nullptr && lane % 4 == h)
        *work.sequence.statistic(p.lse, work.rows.query(mine), head) = end.lse;
    }
    factors[0] = __shfl_sync(kAllLanes, factor, lane & ~3);
    factors[1] = __shfl_sync(kAllLanes, factor, lane & ~3 | 1);
  }

  /// Through shared memory, so that rows leave in whole pieces of 16 bytes.
  FOVEA_DEVICE void store(const Out& o) const {
    constexpr int kPanel = block_m(S) * kPanelRowBytes, kPieces = kD;
    const int lane = lane_id();
#pragma unroll
    for (int c = 0; c < kD; c += 2) {
      const Accumulator& left = o[0][c];
      const u32 a = pack<S.type>(left.x[0], left.x[1]), b = pack<S.type>(left.x[2], left.x[3]);
      if (c + 1 == kD) {
        store_two_matrices(swizzled(tile + c / 8 * kPanel, row + lane % 16, c % 8), a, b);
      } else {
        const Accumulator& right = o[0][c + 1];
        store_matrices(swizzled(tile + c / 8 * kPanel, row + lane % 16, c % 8 + lane / 16), a, b,
                       pack<S.type>(right.x[0], right.x[1]), pack<S.type>(right.x[2], right.x[3]));
      }
    }
    __syncwarp();  // a warp stores what it has put there
    char* const to = work.sequence.q_row(p.out, work.rows.query(row), work.rows.first_head);
#pragma unroll 4
    for (int at = lane; at < 16 * kPieces; at += kWarp) {
      const int r = at / kPieces, piece = at % kPieces;
      if (row + r >= work.rows.left()) break;
      write_piece(to + r * p.out.row + piece * 16,
                  load_shared_16(swizzled(tile + piece / 8 * kPanel, row + r, piece % 8)), 16, p.out.aligned);
    }
  }

  FOVEA_DEVICE void mend(int h, bool broken, float reference, float factor) const {
    const Interval keys{work.tiles.begin * S.block_n, work.tiles.end * S.block_n};
    for (u32 left = __ballot_sync(kAllLanes, broken) & 0x11111111U; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1, r = row + lane / 4 + 8 * h;
      char* const to = work.sequence.q_row(p.out, work.rows.query(r), work.rows.first_head);
      mend_row<S, S.head_dim_v>(rules, keys, work.kv_head, r, __shfl_sync(kAllLanes, reference, lane),
                                __shfl_sync(kAllLanes, factor, lane), 0, p.head_dim_v,
                                [&](int column, float x) { write<S.type>(to + column * kBytes<S.type>, x); });
    }
  }
};

}  // namespace fovea::cuda
