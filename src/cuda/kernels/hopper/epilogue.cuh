#pragma once

#include "cuda/kernels/hopper/state.cuh"
#include "cuda/kernels/row_end.cuh"

// The end of a tile of rows: out and lse, by each warp for its 16 rows.
namespace fovea::cuda {

/// `store_matrices` of two.
FOVEA_DEVICE void store_two_matrices(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

/// `broken` stays 0 unless one of a word's two halves is not finite, which makes it NaN.
template <Type kType>
FOVEA_DEVICE void note_broken(u32& broken, u32 word) {
  if constexpr (kType == Type::kBFloat16) asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(broken) : "r"(word), "r"(0));
  if constexpr (kType == Type::kFloat16) asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(broken) : "r"(word), "r"(0));
}

template <ForwardSm90Spec S>
struct Epilogue {
  static constexpr int kD = S.head_dim_v / 8, kPanel = block_m(S) * kPanelRowBytes;
  using Out = Accumulator[1][kD];
  using Rules = ScoreRules<S, kPacking<S>, AsTheyAre, true>;

  const ForwardSm90Params& p;
  const Work<S>& work;
  const Rules& rules;
  u32 q;    // address of its place in shared memory
  int row;  // the warp's first, of the block

  /// Divides O by the sums and writes it, or a split's part as it is.
  FOVEA_DEVICE void finish(Out& o, const float (&reference)[2], const float (&factors)[2]) const {
    if constexpr (S.split) return finish_part(o, reference);
    if (__any_sync(kAllLanes, factors[0] == 0.0F || factors[1] == 0.0F)) {  // NaN may stand where nothing was seen
#pragma unroll
      for (int x = 0; x < 4 * kD; ++x) {
        float& value = o[0][x / 4].x[x % 4];
        value = factors[x % 4 / 2] == 0.0F ? 0.0F : value;
      }
    }
    u32 broken[2] = {};
    if constexpr (leaves_through_q(S)) {
      store_through_q(o, factors, broken);
    } else {
      store(o, factors, broken);
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) mend(h, broken[h] != 0, reference[h], factors[h]);
  }

  FOVEA_DEVICE void finish_part(const Out& o, const float (&reference)[2]) const {
    const int lane = lane_id();
    bool broken[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + lane / 4 + 8 * h;
      float* const to = part_of(r) + lane % 4 * 2;
      float check = 0.0F;
#pragma unroll
      for (int c = 0; c < kD; ++c) {
        const float2 two{o[0][c].x[2 * h], o[0][c].x[2 * h + 1]};
        if (work.rows.has(r)) *reinterpret_cast<float2*>(to + 8 * c) = two;
        check += two.x * 0.0F + two.y * 0.0F;
      }
      broken[h] = work.rows.has(r) && !(check == 0.0F);
    }
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h) mend(h, broken[h], reference[h], 1.0F);
  }
  FOVEA_DEVICE float* part_of(int r) const {
    const i64 line = i64{work.sequence.batch} * p.q_heads + work.rows.head(r);
    return p.partials +
           ((line * p.seqlen_q + work.rows.query(r)) * p.splits + work.split) * (S.head_dim_v + kPartFacts);
  }

  FOVEA_DEVICE char* row_of_out(int r) const {
    return work.sequence.q_row(p.out, work.rows.query(r), work.rows.head(r));
  }

  /// Adds sinks, writes lse and gives the factors of O, whose last product may still be running.  Of the four lanes
  /// that share two rows two end one each; the others do the same in vain.
  FOVEA_DEVICE void end_rows(const float (&reference)[2], float (&sum)[2], float (&factors)[2]) const {
    sum[0] = quad_sum(sum[0]), sum[1] = quad_sum(sum[1]);
    const int lane = lane_id(), h = lane % 2, r = row + lane / 4 + 8 * h, head = work.rows.head(r);
    float factor = 0.0F;
    if constexpr (S.split) {
      if (work.rows.has(r) && lane % 4 == h)
        *reinterpret_cast<float2*>(part_of(r) + S.head_dim_v) = {h == 0 ? reference[0] : reference[1],
                                                                 h == 0 ? sum[0] : sum[1]};
    } else if (work.rows.has(r)) {
      const RowEnd end = end_of_row<S>(p, head, h == 0 ? reference[0] : reference[1], h == 0 ? sum[0] : sum[1]);
      factor = end.empty ? 0.0F : end.factor;
      if (p.lse.data != nullptr && lane % 4 == h) *work.sequence.statistic(p.lse, work.rows.query(r), head) = end.lse;
    }
    factors[0] = __shfl_sync(kAllLanes, factor, lane & ~3);
    factors[1] = __shfl_sync(kAllLanes, factor, lane & ~3 | 1);
  }

  /// Two neighbours of out as a word: entries of piece c and of row h of a lane's two.
  FOVEA_DEVICE static u32 word(const Out& o, const float (&factors)[2], int c, int h, u32 (&broken)[2]) {
    const u32 word = pack<S.type>(o[0][c].x[2 * h] * factors[h], o[0][c].x[2 * h + 1] * factors[h]);
    note_broken<S.type>(broken[h], word);
    return word;
  }

  /// Through Q's place, so that whole rows are written; it can be released when the copy engine has read them.
  FOVEA_DEVICE void store_through_q(const Out& o, const float (&factors)[2], u32 (&broken)[2]) const {
    const int lane = lane_id();
#pragma unroll
    for (int c = 0; c < kD; c += 2) {
      const u32 at = swizzled(q + c / 8 * kPanel, row + lane % 16, c % 8 + (c + 1 < kD ? lane / 16 : 0));
      const u32 low = word(o, factors, c, 0, broken), high = word(o, factors, c, 1, broken);
      if (c + 1 < kD) {
        store_matrices(at, low, high, word(o, factors, c + 1, 0, broken), word(o, factors, c + 1, 1, broken));
      } else {
        store_two_matrices(at, low, high);
      }
    }
    if (uniform(p.out_by_engine && (p.cu_seqlens_q.data == nullptr || row + kWarpRows <= work.rows.left()))) {
      fence_engine();
      __syncwarp();
      if (lane == 0) leave();
    } else {
      __syncwarp();
      write_out();
      fence_engine();
    }
  }

  /// By the copy engine, which leaves out rows past the tensor, but would write past the end of a packed sequence.
  FOVEA_DEVICE void leave() const {
    const auto to = place_of_rows<S>(work, row, p.cu_seqlens_q.data == nullptr ? work.sequence.batch : 0);
#pragma unroll
    for (int panel = 0; panel < panels_of(S.head_dim_v); ++panel)
      store_panel(p.out_map, q + panel * kPanel + row * kPanelRowBytes, panel * kPanelColumns, to);
    close_additions();
  }

  FOVEA_DEVICE void write_out() const {
#pragma unroll 1
    for (int n = 0; n < kWarpRows * kD; n += kWarp) {
      const int x = n + lane_id(), r = x / kD, piece = x % kD;
      if (x < kWarpRows * kD && work.rows.has(row + r))
        write_piece(row_of_out(row + r) + piece * 16,
                    load_shared_16(swizzled(q + piece / 8 * kPanel, row + r, piece % 8)), 16, p.out.aligned);
    }
  }

  /// From registers: the four lanes of a row exchange words so that each has pieces of 16 bytes.
  FOVEA_DEVICE void store(const Out& o, const float (&factors)[2], u32 (&broken)[2]) const {
    const int lane = lane_id();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + lane / 4 + 8 * h;
      const bool there = work.rows.has(r);
      char* const mine = row_of_out(r) + lane % 4 * 16;
#pragma unroll
      for (int c = 0; c < kD / 4 * 4; c += 4) {
        u32 w[4];
#pragma unroll
        for (int x = 0; x < 4; ++x) w[x] = word(o, factors, c + x, h, broken);
        transpose_quad(w);
        if (there) write_piece(mine + c * 16, {w[0], w[1], w[2], w[3]}, 16, p.out.aligned);
      }
#pragma unroll
      for (int c = kD / 4 * 4; c < kD; ++c) {  // 4 bytes a lane
        const u32 w = word(o, factors, c, h, broken);
        u16* const at = reinterpret_cast<u16*>(mine + c * 16 - lane % 4 * 12);
        if (there) at[0] = static_cast<u16>(w), at[1] = static_cast<u16>(w >> 16);
      }
    }
  }

  FOVEA_DEVICE void mend(int h, bool broken, float reference, float factor) const {
    const Interval keys{work.tiles.begin * S.block_n, work.tiles.end * S.block_n};
    u32 left = __ballot_sync(kAllLanes, broken);
    left |= left >> 1, left |= left >> 2;
    left &= 0x11111111U;
    if (leaves_through_q(S) && left != 0) await_additions<0>(), __syncwarp();  // what is written now comes last
    for (; left != 0; left &= left - 1) {
      const int lane = __ffs(static_cast<int>(left)) - 1, r = row + lane / 4 + 8 * h;
      char* const to = row_of_out(r);
      mend_row<S, S.head_dim_v>(rules, keys, work.kv_head, r, __shfl_sync(kAllLanes, reference, lane),
                                __shfl_sync(kAllLanes, factor, lane), 0, p.head_dim_v, [&](int column, float x) {
                                  if constexpr (S.split) {
                                    part_of(r)[column] = x;
                                  } else {
                                    write<S.type>(to + column * kBytes<S.type>, x);
                                  }
                                });
    }
  }
};

}  // namespace fovea::cuda
