#include "cpu.h"
#include "twin.h"

// Rung 0, the formula, in plain C++ (rung0.cuh): every line of it is a pass over N × N matrices in memory.
namespace fovea::ladder {
namespace {

/// The rows of one head that a task has, of S (or dP) and of P (or dS).
struct RowTask {
  TwinHead head;
  i64 first, end;

  static RowTask of(const Params& p, int dim, i64 task) {
    const i64 tiles = tiles_of(p.seqlen_q, kTile), first = task % tiles * kTile;
    return {{p, dim, task / tiles}, first, std::min<i64>(first + kTile, p.seqlen_q)};
  }
  [[nodiscard]] float* scores(i64 i) const { return head.p.scores + head.row_number(i) * head.p.pitch; }
  [[nodiscard]] float* weights(i64 i) const {
    return reinterpret_cast<float*>(head.p.weights) + head.row_number(i) * head.p.pitch;
  }
};

template <class F>
void by_rows(const Params& p, int dim, i64 heads, const F& f) {
  for_each_task(heads * tiles_of(p.seqlen_q, kTile), [&](i64 task) { f(RowTask::of(p, dim, task)); });
}

/// S = A Bᵀ · factor, for the rows of A and of B.
void score(const RowTask& task, const RowView& a, const RowView& b, float factor) {
  Rows rows, keys;
  Entries entries;
  rows.load(task.head, a, task.first, task.end);
  for (i64 key = 0; key < task.head.p.seqlen_kv; key += kTile) {
    keys.load(task.head, b, key, task.head.p.seqlen_kv);
    entries.multiply(rows, keys);
    for (i64 i = task.first; i < task.end; ++i) {
      for (i64 j = 0; j < keys.count; ++j) task.scores(i)[key + j] = entries.row(i - task.first)[j] * factor;
    }
  }
}

/// Rows of `to` = weights · B · factor.
void weigh(const RowTask& task, const RowView& to, const RowView& b, float factor) {
  const TwinHead& head = task.head;
  std::vector<float> sums(static_cast<std::size_t>(kTile) * head.dim);
  for (i64 key = 0; key < head.p.seqlen_kv; key += kTile) {
    add_product(sums.data(), head.dim, {task.weights(task.first) + key, head.p.pitch, 1}, head.row(b, key),
                head.stride(b), task.end - task.first, std::min<i64>(kTile, head.p.seqlen_kv - key), head.dim);
  }
  for (i64 x = 0; x < (task.end - task.first) * head.dim; ++x)
    head.row(to, task.first + x / head.dim)[x % head.dim] = sums[x] * factor;
}

/// Rows of `to`, keys, = weightsᵀ · B · factor.
void weigh_transposed(const Params& p, int dim, i64 heads, const RowView& to, const RowView& b, float factor) {
  const i64 tiles = tiles_of(p.seqlen_kv, kTile);
  for_each_task(heads * tiles, [&](i64 task) {
    const RowTask all{{p, dim, task / tiles}, 0, p.seqlen_q};
    const i64 key = task % tiles * kTile, count = std::min<i64>(kTile, p.seqlen_kv - key);
    std::vector<float> sums(static_cast<std::size_t>(kTile) * dim);
    for (i64 row = 0; row < p.seqlen_q; row += 4) {  // few rows at once, for they lie far apart
      add_product(sums.data(), dim, {all.weights(row) + key, 1, p.pitch}, all.head.row(b, row), all.head.stride(b),
                  count, std::min<i64>(4, p.seqlen_q - row), dim);
    }
    for (i64 x = 0; x < count * dim; ++x) all.head.row(to, key + x / dim)[x % dim] = sums[x] * factor;
  });
}

void softmax(const RowTask& task) {
  for (i64 i = task.first; i < task.end; ++i) {
    const i64 keys = task.head.visible_keys(i + 1);
    const float *s = task.scores(i), top = keys == 0 ? 0.0F : *std::max_element(s, s + keys);
    float sum = 0.0F;
    for (i64 j = 0; j < keys; ++j) sum += std::exp(s[j] - top);
    for (i64 j = 0; j < task.head.p.seqlen_kv; ++j) task.weights(i)[j] = j < keys ? std::exp(s[j] - top) / sum : 0.0F;
    task.head.statistic(task.head.p.lse, i) = keys == 0 ? kMinusInfinity : top + std::log(sum);
  }
}

void weights_again(const RowTask& task) {
  for (i64 i = task.first; i < task.end; ++i) {
    const float lse = task.head.statistic(task.head.p.lse, i);
    for (i64 j = 0; j < task.head.p.seqlen_kv; ++j)
      task.weights(i)[j] = task.head.visible(i, j) ? std::exp(task.scores(i)[j] - lse) : 0.0F;
  }
}

void softmax_gradient(const RowTask& task) {
  const Params& p = task.head.p;
  for (i64 i = task.first; i < task.end; ++i) {
    const float* dp = task.scores(i);
    float *w = task.weights(i), delta = 0.0F;
    for (i64 j = 0; j < p.seqlen_kv; ++j) delta += w[j] * dp[j];
    if (p.dlse.data != nullptr) delta -= task.head.statistic(p.dlse, i);
    for (i64 j = 0; j < p.seqlen_kv; ++j) w[j] *= dp[j] - delta;
  }
}

}  // namespace

void formula_forward(const Params& p, int dim, i64 heads) {
  by_rows(p, dim, heads, [&](const RowTask& task) { score(task, p.q, p.k, p.scale); });
  by_rows(p, dim, heads, softmax);
  by_rows(p, dim, heads, [&](const RowTask& task) { weigh(task, p.out, p.v, 1.0F); });
}

void formula_backward(const Params& p, int dim, i64 heads) {
  by_rows(p, dim, heads, [&](const RowTask& task) { score(task, p.q, p.k, p.scale); });
  by_rows(p, dim, heads, weights_again);
  weigh_transposed(p, dim, heads, p.dv, p.dout, 1.0F);
  by_rows(p, dim, heads, [&](const RowTask& task) { score(task, p.dout, p.v, 1.0F); });
  by_rows(p, dim, heads, softmax_gradient);
  by_rows(p, dim, heads, [&](const RowTask& task) { weigh(task, p.dq, p.k, p.scale); });
  weigh_transposed(p, dim, heads, p.dk, p.q, p.scale);
}

}  // namespace fovea::ladder
