#pragma once

#include "cuda/kernels/scores.cuh"

// The end of a row, when all its keys have been seen.
namespace fovea::cuda {

/// out of a row is its O times `factor`.
struct RowEnd {
  float factor, lse;
  bool empty;
};
template <auto S>
FOVEA_DEVICE RowEnd end_of_row(const CallParams& p, int head, float reference, float sum) {
  if (sum == 0.0F) return {0.0F, -infinity(), true};  // no visible score above −inf: another leaves more, or a NaN
  float factor = 1.0F;
  if (p.sink != nullptr) {
    const float sink = p.sink[head] * kLog2E, top = fmaxf(sink, reference);
    factor = exp2(reference - top);
    sum = sum * factor + exp2(sink - top);
    reference = top;
  }
  const float kept = S.dropout ? p.keep_scale : 1.0F;
  return {factor * kept / sum, kLn2 * (reference + log2(sum)), false};
}

/// Recomputes O of a row from the keys that it sees alone, by a warp, where O is not finite: a hidden entry has weight
/// 0, but 0 · NaN is NaN, and a sum may overflow where the mean does not.  `factor` is what weights are multiplied by,
/// one over their sum.  Calls store(column, x) for columns [begin, end) of v.
template <auto S, int kWidth, class Rules, class Store>
FOVEA_DEVICE void mend_row(const Rules& rules, Interval keys, int kv_head, int r, float reference, float factor,
                           int begin, int end, const Store& store) {
  constexpr int kColumns = (kWidth + kWarp - 1) / kWarp;  // of a lane
  const CallParams& p = rules.p;
  const Sequence& sequence = rules.sequence;
  const int head = rules.rows.head(r), query = rules.rows.query(r);
  float sum[kColumns] = {};
#pragma unroll 1
  for (int first = keys.begin; first < keys.end; first += kWarp) {
    const int j = first + lane_id();
    const bool visible = j < keys.end && rules.visible(r, j);
    float weight = 0.0F;
    if (visible) {
      const char *q = sequence.q_row(p.q, query, head), *k = sequence.kv_row(p.k, j, kv_head);
      float qk = 0.0F;
#pragma unroll 1
      for (int c = 0; c < p.head_dim; ++c)
        qk += read<S.type>(q + c * kBytes<S.type>) * read<S.type>(k + c * kBytes<S.type>);
      weight = exp2(rules.finished(qk, r, j) * score_unit<S>(p) - reference) * factor;
      if (S.dropout && !rules.kept(r, j)) weight *= 0.0F;  // NaN stays so
    }
#pragma unroll 1
    for (int t = 0; t < kWarp; ++t) {
      const float w = __shfl_sync(kAllLanes, weight, t);
      if (!__shfl_sync(kAllLanes, visible, t)) continue;
      const char* v = sequence.kv_row(p.v, first + t, kv_head);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = begin + n * kWarp + lane_id();
        if (column < end) sum[n] += w * read<S.type>(v + column * kBytes<S.type>);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
    const int column = begin + n * kWarp + lane_id();
    if (column < end) store(column, sum[n]);
  }
}

}  // namespace fovea::cuda
