#pragma once

#include "cuda/kernels/gradient_tile.cuh"
#include "cuda/kernels/hopper/tensor_copy.cuh"

// What `gradient_tile.cuh` does with rows of S and dP, done with Sᵀ and dPᵀ, the A operands of dv and dk.
namespace fovea::cuda {

FOVEA_DEVICE void store_matrices_transposed(u32 address, const OperandA& a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a.x[0]),
               "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3])
               : "memory");
}

/// Of two pairs of 16-bit numbers the products: times 0 NaN stays NaN, and −0 stays −0.
template <Type kType>
FOVEA_DEVICE u32 product_of_two(u32 a, u32 b) {
  if constexpr (kType == Type::kBFloat16) asm("mul.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  if constexpr (kType == Type::kFloat16) asm("mul.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

/// Likewise the lesser ones.
template <Type kType>
FOVEA_DEVICE u32 least_of_two(u32 a, u32 b) {
  if constexpr (kType == Type::kBFloat16) asm("min.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  if constexpr (kType == Type::kFloat16) asm("min.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  return a;
}

/// Of a pair of 16-bit draws each 1 if it is above `most`, else 0.
FOVEA_DEVICE u32 above_of_pair(u32 draws, u32 most) {
  constexpr u32 kBoth = 0x10001;
  asm("{\n.reg .b32 x;\nmax.u16x2 x, %0, %1;\nadd.u16x2 x, x, %2;\nmin.u16x2 %0, x, %3;\n}"
      : "+r"(draws)
      : "r"(most * kBoth), "r"((0x10000 - most & 0xffff) * kBoth), "r"(kBoth));
  return draws;
}

/// Pᵀ and dSᵀ of a warp's 16 keys and a tile of rows.  A lane has the keys l / 4 and 8 on, of the rows 8j + 2 (l % 4)
/// and the next.  A hidden entry is −0 in both, a visible one never.
template <BackwardSpec S>
struct GradientColumns {
  static constexpr int kN = S.block_m / 8;
  using Entries = Accumulator[1][kN];
  using Packed = OperandA[S.block_m / 16];
  using Rules = ScoreRules<S, Packing::kNone, AsTheyAre>;
  static constexpr bool kDeltaFirst = !S.dropout && S.block_m > 64;  // dP comes with delta taken off
  using Bits = u32[kN / 8];                                          // one an entry

  const Rules& rules;
  int key;  // the lane's first
  math::DropoutStream stream;
  Bits seen;                          // what mask and band leave, in `WordOrder::kColumns`
  Bits dropped;                       // by dropout; see `bit_of_drop`
  u32 slopes[S.softcap ? kN : 1][2];  // of softcap, 1 − tanh² of entries e and e + 1, as fp16

  FOVEA_DEVICE static int row_of(int j, int e) { return 8 * j + lane_id() % 4 * 2 + e % 2; }
  FOVEA_DEVICE int key_of(int e) const { return key + e / 2 * 8; }

  FOVEA_DEVICE void see_all() {
    for (u32& word : seen) word = ~0U;
  }
  /// What a mask leaves, from the warp's words in shared memory, of 64 rows each `next` bytes further.
  FOVEA_DEVICE void look_up(u32 words, u32 next = 0) {
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) seen[w] = load_shared(words + w * next + lane_id() * 4);
  }
  /// And what the band leaves of that.
  FOVEA_DEVICE void keep_to_band() {
    const int first = rules.rows.first + row_of(0, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Interval seers = rules.sequence.band.rows_of_key(key_of(2 * h));
#pragma unroll
      for (int w = 0; w < kN / 8; ++w) {
        u32 rows = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int here = first + 64 * w + e, begin = twice_before(seers.begin - here),
                    end = twice_before(seers.end - here);
          rows |= ((bits_between(begin, end) & 0x55U) | (bits_between(begin - 8, end - 8) & 0x55U) << 16) << 8 * e;
        }
        seen[w] &= rows << h | 0x55555555U << (1 - h);
      }
    }
  }

  /// S · scale + bias, of the bias that lies [row][key] in panels of as many rows; keys: the warp's first, counted from
  /// the first panel's.  shared: by all rows, which then read the first one.
  FOVEA_DEVICE void add_bias(Entries& s, u32 panels, int keys, bool shared) const {
    const float scale = S.alibi ? 1.0F : score_factor<S>(rules.p);
    if constexpr (S.bias_type == Type::kFloat32) {
      const int lane = fresh(lane_id()), first = lane % 4 * 2;
      const u32 mine =
          swizzled(panels + keys / 32 * kPanel, shared ? 0 : first, keys % 32 / 4 + lane / 16) + lane / 4 % 4 * 4;
      const u32 row = shared ? 0 : kPanelRowBytes, turn = shared ? 0 : 16;
      each([&](int j, int e) {
        const u32 from = (mine ^ (e % 2 == 0 ? 0 : turn) ^ e / 2 * 32) + (8 * j + e % 2) * row;
        s[0][j].x[e] = s[0][j].x[e] * scale + __uint_as_float(load_shared(from));
      });
    } else {
      for_each_sixteen(panels, keys, shared, [&](int k, const u32(&words)[4]) {
#pragma unroll
        for (int x = 0; x < 8; ++x) {
          float& entry = s[0][2 * k + x / 4].x[x % 4];
          entry = entry * scale + widen_half<S.bias_type>(words[x / 2], x % 2);
        }
      });
    }
  }
  /// Whether a bias hides an entry of the lane's; as `add_bias`.
  FOVEA_DEVICE static bool hides_some(u32 panels, int keys, bool shared) {
    u32 least[4] = {};
    for_each_sixteen(panels, keys, shared, [&](int, const u32(&words)[4]) {
#pragma unroll
      for (int x = 0; x < 4; ++x) least[x] = least_of_two<S.bias_type>(least[x], words[x]);
    });
    const u32 two = least_of_two<S.bias_type>(least_of_two<S.bias_type>(least[0], least[1]),
                                              least_of_two<S.bias_type>(least[2], least[3]));
    return widen_half<S.bias_type>(two, 0) < kLowestBias || widen_half<S.bias_type>(two, 1) < kLowestBias;
  }
  /// A bias of −infinity hides, whatever the entry has become since: memory is asked again.
  FOVEA_DEVICE void hide_by_bias(Packed& entries) const {
    if constexpr (S.bias) {
      const Sequence& sequence = rules.sequence;
#pragma unroll
      for (int w = 0; w < kN / 8; ++w) {
        u32 visible = 0;  // as `seen`
#pragma unroll 1
        for (int x = 31; x >= 0; --x) {  // without a branch, which would leave a warp in parts
          const int row = row_of(8 * w + x / 16 * 4 + x % 8 / 2, x / 8);
          const int i = math::smaller(rules.rows.first + row, sequence.q_rows - 1);
          const int j = math::smaller(key_of(x % 2 * 2), sequence.kv_rows - 1);
          const float of = read<S.bias_type>(sequence.entry(rules.p.bias, i, j, rules.rows.first_head));
          visible = 2 * visible + (of < kLowestBias ? 0 : 1);
        }
        hide(entries, w, visible);
      }
    }
  }

  /// What softcap and ALiBi make of the scores, alike whether entries are hidden or not.
  FOVEA_DEVICE void finish(Entries& s) {
    if constexpr (S.softcap) {
      rules.cap(s);
      for_each_two([&](int j, int e) {
        const float a = s[0][j].x[e], b = s[0][j].x[e + 1];
        slopes[j][e / 2] = cuda::pack<Type::kFloat16>(1.0F - a * a, 1.0F - b * b);
      });
    }
    if constexpr (S.alibi) {
      const float factor = score_factor<S>(rules.p);
      each([&](int j, int e) {
        float& score = s[0][j].x[e];
        score = score * factor - rules.slope(row_of(j, e)) * rules.distance(row_of(j, e), key_of(e));
      });
    }
  }
  /// Sᵀ becomes Pᵀ.
  FOVEA_DEVICE void weigh(Entries& s, u32 log2_lse) const {
    const float unit = any_score_unit<S>(rules.p);
    const u32 mine = log2_lse + lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 lse = load_shared_8(mine + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[0][j].x[e] = exp2(s[0][j].x[e] * unit - (e % 2 == 0 ? lse.x : lse.y));
      }
    }
  }
  /// Once packed, what mask and band hide becomes −0.
  FOVEA_DEVICE void hide(Packed& entries) const {
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) hide(entries, w, seen[w]);
  }

  /// What dropout drops.  Four entries, rows and keys 8 apart, share a draw.  As many at once as registers allow.
  FOVEA_DEVICE void draw() {
    const u32 most = rules.p.keep_threshold - 1;  // of a draw kept
    const u32 patch = math::patch_of(static_cast<u32>(key));
    math::DropoutStream rows = stream;  // the first row's patch has no bit in common with offsets from it
    rows.a ^= math::patch_of(static_cast<u32>(rules.rows.first + row_of(0, 0)));
#pragma unroll
    for (int w = 0; w < kN / 8; ++w) {
      dropped[w] = 0;
#pragma unroll(S.softcap ? 1 : kN > 8 && S.head_dim > 48 ? 2 : 4)
      for (u32 at = 0; at < 32; at += 8) {  // two pieces, 16 rows, a turn
        const math::Draws draws[] = {math::draws_of_patch(rows, w * 32 + at, patch),
                                     math::draws_of_patch(rows, w * 32 + at + 1, patch)};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const u32 pair = __byte_perm(draws[0].words[n / 2], draws[1].words[n / 2], n % 2 == 0 ? 0x5410 : 0x7632);
          dropped[w] = 2 * dropped[w] + above_of_pair(pair, most);
        }
      }
    }
  }

  /// −delta, for dPᵀ to be added to.
  FOVEA_DEVICE static void begin_with_delta(Entries& dp, u32 delta) {
    const u32 mine = delta + fresh(lane_id()) % 4 * 8;  // anew, or d64 spills
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 two = load_shared_8(mine + 32 * j);
      dp[0][j] = {{-two.x, -two.y, -two.x, -two.y}};
    }
  }

  /// 0 where all is finite, and stays so `margin` times as large; NaN otherwise.
  FOVEA_DEVICE static float not_finite(const Entries& c, float margin = 1.0F) {
    float sums[4] = {};
    each([&](int j, int e) { sums[e] += c[0][j].x[e] * margin; });
    return (sums[0] + sums[1] + sums[2] + sums[3]) * 0.0F;
  }
  /// Likewise of delta: a warp's lanes have two rows each.
  FOVEA_DEVICE static float not_finite_delta(u32 delta) {
    float sum = 0.0F;
#pragma unroll
    for (int row = 0; row < S.block_m && !kDeltaFirst; row += 2 * kWarp) {
      const float2 two = load_shared_8(delta + row * 4 + lane_id() * 8);
      sum += two.x * 2.0F + two.y * 2.0F;
    }
    return sum * 0.0F;
  }
  /// Likewise of dP and delta, and of what `differentiate` makes of them: 0 times that is 0.
  FOVEA_DEVICE float not_finite_gradients(const Entries& dp, u32 delta) const {
    return not_finite_delta(delta) + not_finite(dp, S.dropout ? rules.p.keep_scale * 2.0F : 2.0F);
  }

  /// dPᵀ becomes dSᵀ; of a visible entry never −0.  Weights are read from where they are packed: there are no registers
  /// to keep more of their digits.
  template <bool kHides>
  FOVEA_DEVICE void differentiate(Entries& dp, const Packed& weights, u32 delta) const {
    const u32 mine = delta + lane_id() % 4 * 8;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const float2 two = kDeltaFirst ? float2{} : load_shared_8(mine + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& d = dp[0][j].x[e];
        const float weight = unpacked(weights, j, e);
        if constexpr (S.dropout) d = (drops(j, e) ? 0.0F : d) * rules.p.keep_scale;
        if constexpr (!kDeltaFirst) d -= e % 2 == 0 ? two.x : two.y;
        d = kHides && is_hidden(weight) ? -0.0F : weight * d + 0.0F;
      }
    }
  }

  /// What dropout leaves of the weights; what is hidden, or not a number, stays so.
  FOVEA_DEVICE void drop(Packed& weights) const {
    constexpr u32 kOne = S.type == Type::kBFloat16 ? 0x3f80 : 0x3c00;
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
      const int bit = bit_of_drop(n / 2, n % 2 * 2), at = bit % 8;
      const u32 kept = ~dropped[n / 16] >> (bit - at);
      weights[n / 4].x[n % 4] = product_of_two<S.type>(weights[n / 4].x[n % 4], (kept & 0x10001U << at) * (kOne >> at));
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

  /// dS becomes the gradient of the scores before the softcap.  kHides: a hidden entry's slope may be NaN.
  template <bool kHides>
  FOVEA_DEVICE void pass_softcap(Entries& ds) const {
    each([&](int j, int e) {
      float& d = ds[0][j].x[e];
      const float slope = widen<Type::kFloat16>(e % 2 == 0 ? slopes[j][e / 2] & 0xffffU : slopes[j][e / 2] >> 16);
      if constexpr (!kHides) {
        d *= slope;
      } else if (!is_hidden(d)) {
        d = d * slope + 0.0F;
      }
    });
  }

  /// Hides what is hidden of the same entries once packed.
  FOVEA_DEVICE static void hide_as(Entries& entries, const Packed& packed) {
    each([&](int j, int e) {
      if (is_hidden(unpacked(packed, j, e))) entries[0][j].x[e] = -0.0F;
    });
  }

  /// Of a lane, its part of the gradient of the head's slope.
  FOVEA_DEVICE float slope_part(const Entries& ds) const {
    float sum = 0.0F;
    each([&](int j, int e) { sum -= ds[0][j].x[e] * rules.distance(row_of(j, e), key_of(e)); });
    return sum;
  }

  template <class F>
  FOVEA_DEVICE static void each(const F& f) {
    for_each_entry<1, kN>([&](int, int j, int e) { f(j, e); });
  }

 private:
  static constexpr int kPanel = S.block_m * kPanelRowBytes;  // of a bias

  /// Calls f(k, words) for the lane's 16-bit entries of every 16 rows of a bias, as operand A has them.
  template <class F>
  FOVEA_DEVICE static void for_each_sixteen(u32 panels, int keys, bool shared, const F& f) {
    const int lane = fresh(lane_id());
    const u32 mine =
        swizzled(panels + keys / 64 * kPanel, shared ? 0 : lane / 16 * 8 + lane % 8, keys % 64 / 8 + lane / 8 % 2);
    const u32 step = shared ? 0 : 16 * kPanelRowBytes;
#pragma unroll
    for (int k = 0; k < S.block_m / 16; ++k) {
      u32 words[4];
      load_matrices_transposed(words, mine + k * step);
      f(k, words);
    }
  }
  /// Of rows 64w on.  The highest bits of two bytes become masks of the two halves of a word: conditions, seven at a
  /// time, would keep the next product from starting before the last weight is made.
  FOVEA_DEVICE static void hide(Packed& entries, int w, u32 visible) {
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      const int j = 8 * w + x / 8 * 4 + x % 8 / 2;
      u32& two = entries[j / 2].x[j % 2 * 2 + x % 2];
      u32 mask;
      asm("prmt.b32 %0, %1, 0, %2;" : "=r"(mask) : "r"(visible << (7 - x % 8)), "r"(x < 8 ? 0x9988 : 0xbbaa));
      two = two & mask | 0x80008000U & ~mask;
    }
  }
  template <class F>
  FOVEA_DEVICE static void for_each_two(const F& f) {
#pragma unroll
    for (int j = 0; j < kN; ++j) f(j, 0), f(j, 2);
  }
  /// Both entries of a packed word, e and e + 1, have their bits 16 apart.
  FOVEA_FN static constexpr int bit_of_drop(int j, int e) { return 15 - j % 8 * 2 - e / 2 + e % 2 * 16; }
  FOVEA_DEVICE bool drops(int j, int e) const { return (dropped[j / 8] >> bit_of_drop(j, e) & 1) != 0; }

  /// Twice how many of rows 0, 8, 16 and on lie before `end`.
  FOVEA_DEVICE static int twice_before(int end) { return (end + 7 >> 3) * 2; }
};

}  // namespace fovea::cuda
