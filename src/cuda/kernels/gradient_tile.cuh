#pragma once

#include "cuda/kernels/copies.cuh"
#include "cuda/kernels/placed.cuh"
#include "cuda/kernels/scores.cuh"

// What every part of the backward does with a tile of rows and a tile of keys: recompute P from q, k and lse, and
// dS = P ∘ (dP − delta) from dout and v (2205.14135, algorithm 4).
namespace fovea::cuda {

/// Where log2_lse, delta and dq_sum have a tile of rows: [head][slot][row of block_m].
struct RowSlots {
  int first, count;  // of this sequence, of all
  FOVEA_DEVICE RowSlots(const BackwardParams& p, const Sequence& sequence, int block_m)
      : first(p.cu_seqlens_q.data == nullptr ? sequence.batch * p.row_blocks
                                             : first_slot(sequence.q_begin, block_m, sequence.batch)),
        count(p.row_slots) {}
  FOVEA_DEVICE i64 at(int head, int tile) const { return i64{head} * count + first + tile; }
};

/// A block of rows of a head.
struct RowBlock {
  int batch, head, tile;

  /// Blocks: row blocks × heads × batch, or, of packed sequences, heads × slots.
  FOVEA_DEVICE static RowBlock of(const BackwardParams& p, int block_m) {
    const int block = static_cast<int>(blockIdx.x);
    if (p.cu_seqlens_q.data == nullptr)
      return {block / p.row_blocks / p.q_heads, block / p.row_blocks % p.q_heads, block % p.row_blocks};
    const auto [batch, tile] = packed_block(p, p.cu_seqlens_q, p.total_q, block_m, block / p.q_heads);
    return {batch, block % p.q_heads, tile};
  }
};

/// Where blocks of the main kernel turn sums into dq (`ends_dq`), dq_sum has p.dq_places places, each for all rows that
/// read one kv head of a sequence.  These take places in the order of their blocks: `turn`.
struct DqPlaces {
  const BackwardParams& p;

  FOVEA_DEVICE int turn(int batch, int kv_head) const {
    return p.batch_inside ? kv_head * p.batch + batch : batch * p.kv_heads + kv_head;
  }
  /// The first tile of a turn's place; its heads have p.row_blocks each.
  FOVEA_DEVICE int first_tile(int turn) const { return turn % p.dq_places * p.group * p.row_blocks; }
};

/// A hidden entry is −0 in P and in dS, a visible one never.
FOVEA_DEVICE bool is_hidden(float x) { return __float_as_uint(x) == 0x80000000U; }

/// A warp's piece of the tile's P and dS.
template <BackwardSpec S>
struct GradientTile {
  static constexpr WarpGrid kGrid = WarpGrid::of(S.block_m, S.block_n, S.warps);
  static constexpr int kM = kGrid.rows / 16, kN = kGrid.columns / 8;
  using Order = KeyOrder<kGrid.columns, S.bias>;
  using Rules = ScoreRules<S, Packing::kNone, Order>;

  /// The product for dP starts from −delta; not in fp32, which loses digits, nor with dropout, which scales dP.
  static constexpr bool kDeltaFirst = !S.dropout && S.type != Type::kFloat32;

  Accumulator p[kM][kN], ds[kM][kN];
  Accumulator tanhs[S.softcap ? kM : 1][S.softcap ? kN : 1];
  float statistic[kM][2];  // of the rows: log2_lse, then delta

  FOVEA_DEVICE static bool works() { return kGrid.used == S.warps || warp_id() < kGrid.used; }
  FOVEA_DEVICE static int row() { return warp_id() / kGrid.across * kGrid.rows; }
  FOVEA_DEVICE static int column() { return warp_id() % kGrid.across * kGrid.columns; }

  /// kHides: some entry may be hidden.  Returns whether then something was not finite: products with this tile must
  /// leave hidden entries out, because 0 · NaN is NaN.  `statistics`: block_m of log2_lse, then of delta.
  template <bool kHides, class Q, class K, class Dout, class V>
  FOVEA_DEVICE bool compute(const Q& q, const K& k, const Dout& dout, const V& v, u32 statistics, const Rules& rules,
                            int key, const Sight& sight, const math::DropoutStream& stream) {
    const float unit = any_score_unit<S>(rules.p);  // hidden entries are told apart first
    const int lane = fresh(lane_id());
    Entries<S, kM, kN> entries;
    rules.template fetch<S.mask && kHides>(entries, row(), key + column());
    product(p, q, k, lane, [](int) { return Accumulator{}; });
    float check = kHides ? not_finite(p) : 0.0F;
    if constexpr (!kBareScores<S>) rules.score_all(p, row(), key + column(), tanhs_or_null(), entries);
    if constexpr (kHides) {
      rules.hide(p, row(), key + column(), sight, entries);
      if (!(check == 0.0F)) rules.hide_by_bias(p, entries);
    }
    exponentiate<kHides>(statistics, unit);
    load_statistics(statistics + 4 * S.block_m);
    product(ds, dout, v, lane, [&](int i) {
      return kDeltaFirst ? Accumulator{{-statistic[i][0], -statistic[i][0], -statistic[i][1], -statistic[i][1]}}
                         : Accumulator{};
    });
    if constexpr (kHides) check += not_finite(ds);
    differentiate<kHides>(rules, key, stream);
    return !(check == 0.0F);
  }

  /// dS becomes the gradient of the scores before the softcap.
  FOVEA_DEVICE void pass_softcap() {
    if constexpr (S.softcap) {
      each([&](int i, int j, int e) {
        const float t = tanhs[i][j].x[e];
        if (!is_hidden(ds[i][j].x[e])) ds[i][j].x[e] = ds[i][j].x[e] * (1.0F - t * t) + 0.0F;
      });
    }
  }

  template <class F>
  FOVEA_DEVICE static void each(const F& f) {
    for_each_entry<kM, kN>(f);
  }

 private:
  /// C = rows · keysᵀ + start.
  template <class Rows, class Keys, class Start>
  FOVEA_DEVICE static void product(Accumulator (&c)[kM][kN], const Rows& rows, const Keys& keys, int lane,
                                   const Start& start) {
    const auto a = corner_a(rows, lane, row(), 0);
    const auto b = corner_b_rows(keys, lane, column(), 0);
    multiply_steps<S, Rows::kColumns / kStep<S.type>>(
        c, [&](int i, int k) { return load_a(a, 16 * i, k); },
        [&](OperandB(&pair)[2], int j, int k) { load_b_rows(pair, b, 8 * j, k); }, start);
  }

  FOVEA_DEVICE void load_statistics(u32 from) {
    const u32 first = from + 4 * (row() + fresh(lane_id()) / 4);
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) statistic[x / 2][x % 2] = __uint_as_float(load_shared(first + 32 * x));
  }

  FOVEA_DEVICE auto tanhs_or_null() {
    if constexpr (S.softcap) {
      return &tanhs[0];
    } else {
      return static_cast<Accumulator(*)[kN]>(nullptr);
    }
  }

  /// 0 where all is finite, NaN otherwise.
  FOVEA_DEVICE static float not_finite(const Accumulator (&c)[kM][kN]) {
    float sums[4] = {};
    each([&](int i, int j, int e) { sums[e] += c[i][j].x[e] * 0.0F; });
    return sums[0] + sums[1] + sums[2] + sums[3];
  }

  template <bool kHides>
  FOVEA_DEVICE void exponentiate(u32 log2_lse, float unit) {
    load_statistics(log2_lse);
    each([&](int i, int j, int e) {
      const float s = p[i][j].x[e];
      float log = s * unit - statistic[i][e / 2];
      if (S.type == Type::kFloat32 && log > 0.0F) log = 0.0F;  // what digits of large scores have lost; NaN stays
      const float weight = exp2(log);
      p[i][j].x[e] = kHides && is_hidden_score<S>(s) ? -0.0F : weight;
    });
  }

  template <bool kHides>
  FOVEA_DEVICE void differentiate(const Rules& rules, int key, const math::DropoutStream& stream) {
    if constexpr (S.dropout) {
      rules.template for_each_draw<kM, kN>(row(), key + column(), stream, [&](int i, int j, int e, bool kept) {
        float &x = p[i][j].x[e], &d = ds[i][j].x[e];
        d = (kept ? d : 0.0F) * rules.p.keep_scale - statistic[i][e / 2];
        pass_softmax<kHides>(x, d);
        if (!kept && !(kHides && is_hidden(x))) x *= 0.0F;
      });
    } else {
      each([&](int i, int j, int e) {
        if constexpr (!kDeltaFirst) ds[i][j].x[e] -= statistic[i][e / 2];
        pass_softmax<kHides>(p[i][j].x[e], ds[i][j].x[e]);
      });
    }
  }
  /// dP − delta becomes dS; of a visible entry never −0.
  template <bool kHides>
  FOVEA_DEVICE static void pass_softmax(float weight, float& d) {
    d = kHides && is_hidden(weight) ? -0.0F : weight * d + 0.0F;
  }
};

/// C += A · B term by term, a(k, row) · b(k, column), without the hidden entries of A: for tiles in which something
/// hidden may not be finite.
template <int kSteps, class Columns = SideBySide, int kM, int kN, class A, class B>
FOVEA_DEVICE void multiply_seen(Accumulator (&sum)[kM][kN], int first_row, int first_column, const A& a, const B& b) {
  const int row = fresh(first_row + lane_id() / 4), column = fresh(first_column + lane_id() % 4 * 2);
#pragma unroll 1
  for (int k = 0; k < kSteps; ++k) {
    float factors[kM][2];
#pragma unroll
    for (int x = 0; x < 2 * kM; ++x) factors[x / 2][x % 2] = a(k, row + 8 * x);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float other = b(k, column + Columns::offset(j) + e);
#pragma unroll
        for (int x = 0; x < 2 * kM; ++x) {
          const float factor = factors[x / 2][x % 2];
          if (!is_hidden(factor)) sum[x / 2][j].x[x % 2 * 2 + e] += factor * other;
        }
      }
    }
  }
}

}  // namespace fovea::cuda
