#include "cpu.h"
#include "twin.h"

// Rung 3, FlashAttention-2, in plain C++ (rung3.cuh): queries outside, keys inside; O stays where it is until its rows
// are done, and is divided once.  Its backward on a CPU is rung 2's: there are no warps among
// which sums could be shared out in another way.
namespace fovea::ladder {
namespace {

/// Rows [first, end) of a head, not more than a tile of them.
void attend(const TwinHead& head, i64 first, i64 end) {
  const Params& p = head.p;
  const int dim = head.dim;
  Rows queries, keys, values;
  Entries s;
  std::vector<float> o(static_cast<std::size_t>(kTile) * dim), maxima(kTile, kMinusInfinity), sums(kTile);
  queries.load(head, p.q, first, end);
  for (i64 key = 0; key < head.visible_keys(end); key += kTile) {
    keys.load(head, p.k, key, p.seqlen_kv);
    values.load(head, p.v, key, p.seqlen_kv);
    s.multiply(queries, keys);
    for (i64 r = 0; r < queries.count; ++r) {
      const i64 seen = std::clamp<i64>(head.visible_keys(first + r + 1) - key, 0, keys.count);
      float* weights = s.row(r);
      if (seen == 0) {
        std::fill_n(weights, kTile, 0.0F);
        continue;
      }
      const float before = maxima[r];
      for (i64 j = 0; j < seen; ++j) maxima[r] = std::max(maxima[r], weights[j] * p.scale);
      const float factor = std::exp(before - maxima[r]);
      sums[r] *= factor;
      for (i64 j = 0; j < seen; ++j) sums[r] += weights[j] = std::exp(weights[j] * p.scale - maxima[r]);
      std::fill(weights + seen, weights + kTile, 0.0F);
      for (int c = 0; c < dim; ++c) o[r * dim + c] *= factor;
    }
    add_product(o.data(), dim, s.factor(), values.rows.data(), dim, queries.count, values.count, dim);
  }
  for (i64 r = 0; r < queries.count; ++r) {
    float* out = head.row(p.out, first + r);
    for (int c = 0; c < dim; ++c) out[c] = sums[r] == 0.0F ? 0.0F : o[r * dim + c] / sums[r];
    head.statistic(p.lse, first + r) = maxima[r] + std::log(sums[r]);
  }
}

}  // namespace

void flash2_forward(const Params& p, int dim, i64 heads) {
  const i64 parts = tiles_of(p.seqlen_q, kTile);
  for_each_task(heads * parts, [&](i64 task) {
    const i64 first = (parts - 1 - task / heads) * kTile;  // those that see the most keys come first
    attend({p, dim, task % heads}, first, std::min<i64>(first + kTile, p.seqlen_q));
  });
}

}  // namespace fovea::ladder
