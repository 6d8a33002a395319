#pragma once

#include "cuda/kernels/hopper/entries.cuh"
#include "cuda/kernels/hopper/wgmma.cuh"
#include "cuda/kernels/scores.cuh"

// The softmax of 64 rows by a reference instead of a running maximum: any reference gives the same result, as long as
// weights stay in range.  The first tile's maximum is taken; later tiles are weighed at once, and only where a sum
// shows that scores have outgrown their reference is the maximum of that tile looked for.
namespace fovea::cuda {

template <ForwardSm90Spec S>
struct Softmax {
  static constexpr int kN = S.block_n / 8, kSteps = S.block_n / 16;
  using Scores = Accumulator[1][kN];
  using Weights = OperandA[kSteps];
  using Found = TileEntries<S>;
  static constexpr bool kBeginsWithSlopes = begins_with_slopes(S);
  /// Softcap is part of weighing where nothing comes between them; beside dropout some tiles have no registers for it.
  static constexpr bool kWeighsCapped = S.softcap && !S.alibi && !S.bias && !S.mask && !S.dropout;

  /// Below every score but −infinity, whose distance from it still is −infinity.
  static constexpr float kUnseen = -3.40282347e38F;
  /// Of a lane's part of a row of a tile: weights stay within fp16's range, and sums keep their digits.
  static constexpr float kMost = 8192.0F;

  float reference[2] = {kUnseen, kUnseen};  // of a lane's two rows, in units of log2
  float sum[2] = {};                        // this lane's part
  float beside[2] = {};                     // what slopes leave out of a tile's scores, likewise
  int steps = 0;                            // of `weigh_capped` that products have outgrown

  /// P = 2^(unit·S − reference) of the first keys, its sums, and dropout's share.
  template <int kPieces>
  FOVEA_DEVICE void weigh(const Accumulator (&s)[1][kPieces], Weights& weights, float (&total)[2], float unit,
                          const Found& entries, const math::DropoutStream& stream) const {
    weigh_all(s, weights, total, entries, stream, [&](float x, int h) { return __fmaf_rn(x, unit, from(h)); });
  }
  /// Likewise of products that a softcap has yet to make scores of.  False where some are too large for that.
  FOVEA_DEVICE bool weigh_capped(const Scores& s, Weights& weights, float (&total)[2], const Found& entries) {
    const CallParams& p = entries.rules.p;
    if (steps == 0) {
      if (weigh_by<3>(p.few_terms, s, weights, total, entries)) return true;
      steps = 1;
    }
    if (steps == 1) {
      if (weigh_by<6>(p.more_terms, s, weights, total, entries)) return true;
      steps = 2;
    }
    return false;
  }
  template <int kTerms>
  FOVEA_DEVICE bool weigh_by(const CappedExponent& exponent, const Scores& s, Weights& weights, float (&total)[2],
                             const Found& entries) const {
    u32 all = 0;  // squares lie within a power of two, so that one beyond shows in the bits of all
    weigh_all(s, weights, total, entries, {}, [&](float x, int h) {
      const float z = __fmaf_rn(x, x, exponent.square);
      all |= __float_as_uint(z);
      float factor = exponent.terms[kTerms - 1];
#pragma unroll
      for (int i = kTerms - 2; i >= 0; --i) factor = __fmaf_rn(factor, z, exponent.terms[i]);
      return __fmaf_rn(x, factor, from(h));
    });
    return __all_sync(kAllLanes, __uint_as_float(all) < 2.0F * exponent.square);
  }
  template <int kPieces, class Exponent>
  FOVEA_DEVICE static void weigh_all(const Accumulator (&s)[1][kPieces], Weights& weights, float (&total)[2],
                                     const Found& entries, const math::DropoutStream& stream,
                                     const Exponent& exponent) {
    total[0] = total[1] = 0.0F;
#pragma unroll
    for (int k = 0; k < kPieces / 2; ++k) {
      Accumulator two[2];
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        const int h = x % 4 / 2, j = 2 * k + x / 4;
        const float w = exp2(exponent(s[0][j].x[x % 4], h));
        two[x / 4].x[x % 4] = w;
        total[h] += w;
      }
      if constexpr (S.dropout) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          entries.rules.for_each_draw(0, 2 * k, e, entries.row, entries.key, stream,
                                      [&](int piece, int entry, bool kept) {
                                        if (!kept) two[piece - 2 * k].x[entry] = 0.0F;
                                      });
        }
      }
      weights[k] = operand_a<S.type>(two, 0);
    }
  }

  /// Whether a tile's weights may stand; not where something is not a number.  Of the whole warp.
  FOVEA_DEVICE static bool outgrown(const float (&total)[2]) {
    return __any_sync(kAllLanes, !(total[0] < kMost && total[1] < kMost));
  }

  /// Raises each row's reference to the largest score of the tile; what sums and O have to be multiplied by.
  template <int kPieces>
  FOVEA_DEVICE void raise(const Accumulator (&s)[1][kPieces], float unit, float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -infinity();
#pragma unroll
      for (int j = 0; j < kPieces; ++j) top = fmaxf(top, fmaxf(s[0][j].x[2 * h], s[0][j].x[2 * h + 1]));
      top = quad_max(top);
      top = fmaxf(reference[h], kBeginsWithSlopes ? __fmaf_rn(top, unit, beside[h]) : top * unit);
      rescale[h] = exp2(reference[h] - top);
      reference[h] = top;
    }
  }
  /// What a row's scores are weighed from.
  FOVEA_DEVICE float from(int h) const { return kBeginsWithSlopes ? beside[h] - reference[h] : -reference[h]; }
  FOVEA_DEVICE void add(const float (&total)[2]) { sum[0] += total[0], sum[1] += total[1]; }
};

}  // namespace fovea::cuda
