#pragma once

#include "cuda/kernels/gradient_tile.cuh"

// What `gradient_tile.cuh` does with rows of S and dP, done with Sᵀ and dPᵀ, which come out as the A operands of dv and
// dk.
namespace fovea::cuda {

/// Two words that lie side by side.
FOVEA_DEVICE float2 load_shared_two(u32 address) {
  float2 two;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(two.x), "=f"(two.y) : "r"(address) : "memory");
  return two;
}

/// Of two 16-bit numbers those whose bit is set, the others times 0: NaN stays NaN, and −0 stays −0.
template <Type kType>
FOVEA_DEVICE u32 keep_of_two(u32 two, u32 bits) {
  constexpr u32 kOne = kType == Type::kBFloat16 ? 0x3f80 : 0x3c00;
  const u32 factors = (bits & 1) * kOne | (bits >> 1 & 1) * (kOne << 16);
  if constexpr (kType == Type::kBFloat16) asm("mul.bf16x2 %0, %0, %1;" : "+r"(two) : "r"(factors));
  if constexpr (kType == Type::kFloat16) asm("mul.f16x2 %0, %0, %1;" : "+r"(two) : "r"(factors));
  return two;
}

/// Pᵀ and dSᵀ of a warp's 16 keys and a tile of rows.  A lane has the keys l / 4 and 8 on, of the rows 8j + 2 (l % 4)
/// and the next.  A hidden entry is −0 in both, a visible one never.
template <BackwardSpec S>
struct GradientColumns {
  static constexpr int kN = S.block_m / 8;
  using Entries = Accumulator[1][kN];
  using Packed = OperandA[S.block_m / 16];
  using Rules = ScoreRules<S, false, AsTheyAre>;
  static constexpr bool kDeltaFirst = !S.dropout && S.block_m > 64;  // dP comes with delta taken off
  using Bits = u32[S.mask || S.dropout ? kN / 8 : 1];                // one an entry: 4j + e

  const Rules& rules;
  int key;  // the lane's first
  math::DropoutStream stream;
  const Bits& seen;                   // what a mask leaves
  Bits kept;                          // what dropout keeps
  u32 slopes[S.softcap ? kN : 1][2];  // 1 − tanh² of entries e and e + 1, as fp16

  FOVEA_DEVICE static int row_of(int j, int e) { return 8 * j + lane_id() % 4 * 2 + e % 2; }
  FOVEA_DEVICE int key_of(int e) const { return key + e / 2 * 8; }

  /// What a mask leaves of a tile of rows to the keys of a lane.
  FOVEA_DEVICE static void look_up(Bits& seen, const Rules& rules, int key) {
    const WordView& view = rules.p.mask_words;
    const u32* const from = view.data + rules.sequence.batch * view.batch + rules.rows.first_head * view.head +
                            i64{math::smaller(key / 32, view.count - 1)} * view.rows;
    const int last = rules.rows.rows - 1;
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) {
      seen[w] = 0;
#pragma unroll 4
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = math::smaller(rules.rows.first + row_of(8 * w + j, e), last);
          const u32 both = from[row * view.row] >> key % 32;
          seen[w] |= ((both & 1) | (both >> 8 & 1) << 2) << (4 * j + e);
        }
      }
    }
  }

  /// Sᵀ becomes Pᵀ.  kHides: some entry may be hidden; returns 0 where all was finite then.  full_band: not by the
  /// band.
  template <bool kHides>
  FOVEA_DEVICE float weigh(Entries& s, u32 log2_lse, bool full_band) {
    const float unit = (kBareScores<S> ? rules.p.scale : 1.0F) * kLog2E;  // of any sign: hidden entries are told apart
    const float check = kHides ? not_finite(s) : 0.0F;
    if constexpr (!kBareScores<S>) {
      for_each_two([&](int j, int e) {
        float t[2];
#pragma unroll
        for (int x = 0; x < 2; ++x) {
          float& score = s[0][j].x[e + x];
          score = rules.score(score, row_of(j, e + x), key_of(e), 0.0F, &t[x]);
        }
        if constexpr (S.softcap) slopes[j][e / 2] = cuda::pack<Type::kFloat16>(1.0F - t[0] * t[0], 1.0F - t[1] * t[1]);
      });
    }
    if (kHides && !full_band) hide_outside_band(s);
    if constexpr (kHides && S.mask) {
      each([&](int j, int e) { s[0][j].x[e] = holds(seen, j, e) ? s[0][j].x[e] : -infinity(); });
    }
    if constexpr (S.dropout) draw();
    const u32 mine = log2_lse + lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 lse = load_shared_two(mine + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float x = s[0][j].x[e], weight = exp2(x * unit - (e % 2 == 0 ? lse.x : lse.y));
        s[0][j].x[e] = kHides && x == -infinity() ? -0.0F : weight;
      }
    }
    return check;
  }

  /// −delta, for dPᵀ to be added to.
  FOVEA_DEVICE static void begin_with_delta(Entries& dp, u32 delta) {
    const u32 mine = delta + lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 two = load_shared_two(mine + 32 * j);
      dp[0][j] = {{-two.x, -two.y, -two.x, -two.y}};
    }
  }

  /// 0 where all is finite, NaN otherwise.
  FOVEA_DEVICE static float not_finite(const Entries& c) {
    float sums[4] = {};
    each([&](int j, int e) { sums[e] += c[0][j].x[e] * 0.0F; });
    return sums[0] + sums[1] + sums[2] + sums[3];
  }

  /// dPᵀ becomes dSᵀ; of a visible entry never −0.  Weights are read from where they are packed: there are no registers
  /// to keep more of their digits.
  template <bool kHides>
  FOVEA_DEVICE void differentiate(Entries& dp, const Packed& weights, u32 delta) const {
    const u32 mine = delta + lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 two = kDeltaFirst ? float2{} : load_shared_two(mine + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& d = dp[0][j].x[e];
        const float weight = unpacked(weights, j, e);
        if constexpr (S.dropout) d = (holds(kept, j, e) ? d : 0.0F) * rules.p.keep_scale;
        if constexpr (!kDeltaFirst) d -= e % 2 == 0 ? two.x : two.y;
        d = kHides && is_hidden(weight) ? -0.0F : weight * d + 0.0F;
      }
    }
  }

  /// What dropout leaves of the weights; what is hidden, or not a number, stays so.
  FOVEA_DEVICE void drop(Packed& weights) const {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        u32& two = weights[j / 2].x[j % 2 * 2 + e / 2];
        two = keep_of_two<S.type>(two, kept[j / 8] >> (4 * j % 32 + e));
      }
    }
  }
  FOVEA_DEVICE static void pack(Packed& packed, const Entries& entries) {
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) packed[k] = operand_a<S.type>(entries[0], k);
  }
  FOVEA_DEVICE static float unpacked(const Packed& packed, int j, int e) {
    const u32 two = packed[j / 2].x[j % 2 * 2 + e / 2];
    if constexpr (S.type == Type::kBFloat16) return __uint_as_float(e % 2 == 0 ? two << 16 : two & 0xffff0000U);
    return widen<S.type>(e % 2 == 0 ? two & 0xffffU : two >> 16);
  }

  /// dS becomes the gradient of the scores before the softcap.
  FOVEA_DEVICE void pass_softcap(Entries& ds) const {
    each([&](int j, int e) {
      float& d = ds[0][j].x[e];
      const float slope = widen<Type::kFloat16>(e % 2 == 0 ? slopes[j][e / 2] & 0xffffU : slopes[j][e / 2] >> 16);
      if (!is_hidden(d)) d = d * slope + 0.0F;
    });
  }

  /// Of a lane, its part of the gradient of the head's slope.
  FOVEA_DEVICE float slope_part(const Entries& ds) const {
    float sum = 0.0F;
    each([&](int j, int e) { sum -= ds[0][j].x[e] * rules.distance(row_of(j, e), key_of(e)); });
    return sum;
  }

 private:
  template <class F>
  FOVEA_DEVICE static void each(const F& f) {
    for_each_entry<1, kN>([&](int, int j, int e) { f(j, e); });
  }
  template <class F>
  FOVEA_DEVICE static void for_each_two(const F& f) {
#pragma unroll
    for (int j = 0; j < kN; ++j) f(j, 0), f(j, 2);
  }
  FOVEA_DEVICE static bool holds(const Bits& bits, int j, int e) { return (bits[j / 8] >> (4 * j % 32 + e) & 1) != 0; }

  FOVEA_DEVICE void hide_outside_band(Entries& s) const {
    const int first = rules.rows.first + row_of(0, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Interval seers = rules.sequence.band.rows_of_key(key_of(2 * h));
      seers = {seers.begin - first, seers.end - first};
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[0][j].x[2 * h + e];
          x = seers.contains(8 * j + e) ? x : -infinity();
        }
      }
    }
  }

  /// Four entries share a draw: rows 8 apart and keys 8 apart.  Few draws at once, for registers are full.
  FOVEA_DEVICE void draw() {
    const u32 most = (rules.p.keep_threshold << 16) - 1;  // of a draw kept, in the upper half of a word
    const u32 patch = math::patch_of(key), first = math::patch_of(rules.rows.first + row_of(0, 0));
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) {
      kept[w] = 0;
#pragma unroll 1
      for (u32 at = 0; at < 32; at += 8) {  // two pieces, 16 rows, a turn
#pragma unroll
        for (u32 e = 0; e < 2; ++e) {
          const math::Draws draws = math::draws_of_patch(stream, first + w * 32 + at + e, patch);
#pragma unroll
          for (u32 low = 0; low < 2; ++low) {
            kept[w] |= static_cast<u32>(draws.words[low] << 16 <= most) << (at + 4 * low + e);
            kept[w] |= static_cast<u32>(draws.words[low] <= most) << (at + 4 * low + e + 2);
          }
        }
      }
    }
  }
};

}  // namespace fovea::cuda
