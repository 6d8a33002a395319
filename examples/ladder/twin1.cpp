#include <atomic>

#include "cpu.h"
#include "twin.h"

// Rungs 1 and 2, FlashAttention, in plain C++ (rung1.cuh, rung2.cuh): keys outside, queries inside; O, m and l of every
// row go to memory and come back for every block of keys.
namespace fovea::ladder {
namespace {

/// The rows [first, end) of a head past all keys.
void attend(const TwinHead& head, i64 first, i64 end) {
  const Params& p = head.p;
  Rows keys, values, queries;
  Entries s;
  std::vector<float> added(static_cast<std::size_t>(head.dim));
  for (i64 i = first; i < end; ++i) {
    std::fill_n(head.of_row(p.o, i), head.dim, 0.0F);
    p.maxima[head.row_number(i)] = kMinusInfinity;
    p.sums[head.row_number(i)] = 0.0F;
  }
  for (i64 key = 0; key < head.visible_keys(end); key += kTile) {
    keys.load(head, p.k, key, p.seqlen_kv);
    values.load(head, p.v, key, p.seqlen_kv);
    for (i64 row = std::max(first, head.first_row(key)); row < end; row += kTile) {
      queries.load(head, p.q, row, end);
      s.multiply(queries, keys);
      for (i64 r = 0; r < queries.count; ++r) {
        const i64 i = row + r, number = head.row_number(i), seen = std::min(head.visible_keys(i + 1) - key, keys.count);
        float* weights = s.row(r);
        float top = kMinusInfinity, sum = 0.0F;  // m̃ and l̃: of this block of keys alone
        for (i64 j = 0; j < seen; ++j) top = std::max(top, weights[j] *= p.scale);
        for (i64 j = 0; j < seen; ++j) sum += weights[j] = std::exp(weights[j] - top);
        std::fill(added.begin(), added.end(), 0.0F);
        add_product(added.data(), 0, {weights, 0, 1}, values.rows.data(), head.dim, 1, seen, head.dim);
        const float maximum = std::max(p.maxima[number], top);
        const float old_share = p.sums[number] * std::exp(p.maxima[number] - maximum);
        const float new_share = std::exp(top - maximum), total = old_share + new_share * sum;
        float* o = head.of_row(p.o, i);
        for (int c = 0; c < head.dim; ++c) o[c] = (old_share * o[c] + new_share * added[c]) / total;
        p.maxima[number] = maximum;
        p.sums[number] = total;
      }
    }
  }
  for (i64 i = first; i < end; ++i) {
    const i64 number = head.row_number(i);
    std::copy_n(head.of_row(p.o, i), head.dim, head.row(p.out, i));
    head.statistic(p.lse, i) = p.maxima[number] + std::log(p.sums[number]);
  }
}

/// dK and dV of the keys from `key` on, and their share of dQ, added to memory by atomics.
void differentiate(const TwinHead& head, i64 key) {
  const Params& p = head.p;
  const int dim = head.dim;
  Rows keys, values, queries, douts;
  Entries weights, ds;
  const auto zeros = std::vector<float>(static_cast<std::size_t>(kTile) * dim);
  std::vector<float> dk = zeros, dv = zeros, dq;
  keys.load(head, p.k, key, p.seqlen_kv);
  values.load(head, p.v, key, p.seqlen_kv);
  for (i64 row = head.first_row(key); row < p.seqlen_q; row += kTile) {
    queries.load(head, p.q, row, p.seqlen_q);
    douts.load(head, p.dout, row, p.seqlen_q);
    weights.multiply(queries, keys);
    ds.multiply(douts, values);
    for (i64 r = 0; r < queries.count; ++r) {
      const float lse = head.statistic(p.lse, row + r), delta = p.delta[head.row_number(row + r)];
      for (i64 j = 0; j < kTile; ++j) {
        float& weight = weights.row(r)[j];
        weight = head.visible(row + r, key + j) ? std::exp(weight * p.scale - lse) : 0.0F;
        ds.row(r)[j] = weight * (ds.row(r)[j] - delta);
      }
    }
    add_product(dv.data(), dim, weights.transposed(), douts.rows.data(), dim, keys.count, queries.count, dim);
    add_product(dk.data(), dim, ds.transposed(), queries.rows.data(), dim, keys.count, queries.count, dim);
    dq = zeros;
    add_product(dq.data(), dim, ds.factor(), keys.rows.data(), dim, queries.count, keys.count, dim);
    for (i64 x = 0; x < queries.count * dim; ++x)
      std::atomic_ref(head.of_row(p.dq_sum, row)[x]).fetch_add(dq[x], std::memory_order_relaxed);
  }
  for (i64 x = 0; x < keys.count * dim; ++x) {
    head.row(p.dk, key + x / dim)[x % dim] = dk[x] * p.scale;
    head.row(p.dv, key + x / dim)[x % dim] = dv[x];
  }
}

}  // namespace

void flash_forward(const Params& p, int dim, i64 heads, bool over_sequence) {
  if (!over_sequence) return for_each_task(heads, [&](i64 head) { attend({p, dim, head}, 0, p.seqlen_q); });
  const i64 parts = tiles_of(p.seqlen_q, kSequenceRows);
  for_each_task(heads * parts, [&](i64 task) {
    const i64 first = (parts - 1 - task / heads) * kSequenceRows;  // those that see the most keys come first
    attend({p, dim, task % heads}, first, std::min<i64>(first + kSequenceRows, p.seqlen_q));
  });
}

void flash_backward(const Params& p, int dim, i64 heads, bool over_sequence) {
  if (!over_sequence) {
    return for_each_task(heads, [&](i64 head) {
      for (i64 key = 0; key < p.seqlen_kv; key += kTile) differentiate({p, dim, head}, key);
    });
  }
  for_each_task(heads * tiles_of(p.seqlen_kv, kTile), [&](i64 task) {
    differentiate({p, dim, task % heads}, task / heads * kTile);
  });
}

}  // namespace fovea::ladder
