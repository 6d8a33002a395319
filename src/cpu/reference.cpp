#include "cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/elements.h"

namespace fovea::cpu {

// ------------------------------------------------------------------------------------------------ dropout bits

std::array<std::uint32_t, 4> philox4x32_10(std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ULL * c[0], b = 0xCD9E8D57ULL * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key = {key[0] + 0x9E3779B9U, key[1] + 0xBB67AE85U};
  }
  return c;
}

std::array<std::uint32_t, 2> philox2x32_7(std::array<std::uint32_t, 2> c, std::uint32_t key) {
  for (int round = 0; round < 7; ++round) {
    const std::uint64_t a = 0xD256D193ULL * c[0];
    c = {static_cast<std::uint32_t>(a >> 32) ^ key ^ c[1], static_cast<std::uint32_t>(a)};
    key += 0x9E3779B9U;
  }
  return c;
}

// ---------------------------------------------------------------------------------------------------- operands

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLowestBias = -2.3586e38;  // below it a bias hides

std::vector<std::int64_t> load_integers(const Tensor& t) {
  const std::vector<double> values = load_all(t);
  return {values.begin(), values.end()};
}

Matrix load_matrix(const Tensor& t) {
  Matrix m{t.defined(), load_all(t), {}};
  std::int64_t stride = 1;
  for (int axis = 3; axis >= 0 && m.present; --axis) {
    m.strides[axis] = t.shape[axis] == 1 ? 0 : stride;
    stride *= t.shape[axis];
  }
  return m;
}

/// Where the diagonal of a band stands: in the row i of a sequence it runs through the key i + offset.
std::int64_t diagonal_offset(const Problem& problem, const SequenceRows& s) {
  return problem.causal == Causal::kTopLeft ? 0 : s.len_kv - s.len_q;
}

/// T of the contract: an entry is kept where its draw of 16 bits is less.
std::int64_t kept_of_65536(const Problem& problem) {
  return std::llround((1.0 - static_cast<double>(problem.dropout.probability)) * 65536.0);
}

}  // namespace

Operands::Operands(const Problem& p, const Inputs& in)
    : problem(p),
      q(load_all(in.q)),
      k(load_all(in.k)),
      v(load_all(in.v)),
      alibi_slopes(load_all(in.alibi_slopes)),
      sink(load_all(in.sink)),
      dout(load_all(p.backward() ? in.dout : Tensor{})),
      dlse(load_all(p.backward() ? in.dlse : Tensor{})),
      mask(load_matrix(in.mask)),
      bias(load_matrix(in.bias)) {
  const auto starts_q = load_integers(in.cu_seqlens_q), starts_kv = load_integers(in.cu_seqlens_kv);
  const auto q_lengths = load_integers(in.q_lengths), kv_lengths = load_integers(in.kv_lengths);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    SequenceRows s{b * p.seqlen_q, p.seqlen_q, 0, b * p.seqlen_kv, p.seqlen_kv, 0};
    if (p.packed()) {
      s = {starts_q[b], starts_q[b + 1] - starts_q[b], 0, starts_kv[b], starts_kv[b + 1] - starts_kv[b], 0};
    }
    s.len_q = q_lengths.empty() ? s.slot_q : q_lengths[b];
    s.len_kv = kv_lengths.empty() ? s.slot_kv : kv_lengths[b];
    sequences.push_back(s);
  }
  if (p.dropout.probability == 0.0F) return;
  const auto [seed, offset] = in.dropout_draws.value_or(DropoutDraws{p.dropout.seed, p.dropout.offset});
  for (std::int64_t head = 0; head < p.batch * p.num_q_heads; ++head) {
    streams_.push_back(philox4x32_10({static_cast<std::uint32_t>(head), 0, static_cast<std::uint32_t>(offset),
                                      static_cast<std::uint32_t>(offset >> 32)},
                                     {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}));
  }
}

std::int64_t Operands::kv_row(std::int64_t b, std::int64_t h, std::int64_t j) const {
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  return (sequences[b].first_kv + j) * problem.num_kv_heads + h / group;
}

std::int64_t Operands::lse_at(std::int64_t b, std::int64_t h, std::int64_t i) const {
  if (problem.packed()) return h * problem.total_q + sequences[b].first_q + i;
  return (b * problem.num_q_heads + h) * problem.seqlen_q + i;
}

std::int64_t Operands::slope_at(std::int64_t b, std::int64_t h) const {
  return problem.alibi == Alibi::kPerBatchAndHead ? b * problem.num_q_heads + h : h;
}

double Operands::scale() const {
  return problem.softmax_scale ? *problem.softmax_scale : 1.0 / std::sqrt(static_cast<double>(problem.head_dim));
}

bool Operands::visible(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  const SequenceRows& s = sequences[b];
  if (i >= s.len_q || j >= s.len_kv) return false;
  const std::int64_t after = j - (i + diagonal_offset(problem, s));  // of the diagonal
  if (problem.causal != Causal::kNone && after > 0) return false;
  if (problem.window_right && after > *problem.window_right) return false;
  if (problem.window_left && -after > *problem.window_left) return false;
  if (mask.present && mask.values[mask.at(b, h, i, j)] == 0.0) return false;
  return !(bias.present && bias.values[bias.at(b, h, i, j)] < kLowestBias);
}

double Operands::distance(std::int64_t b, std::int64_t i, std::int64_t j) const {
  return static_cast<double>(std::abs(i + diagonal_offset(problem, sequences[b]) - j));
}

double Operands::dropout(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
  if (problem.dropout.probability == 0.0F) return 1.0;
  const auto& [key, a, c, unused] = streams_[b * problem.num_q_heads + h];
  const auto m = static_cast<std::uint32_t>(i / 16 * 8 + i % 8), n = static_cast<std::uint32_t>(j / 16 * 8 + j % 8);
  const std::uint32_t word = philox2x32_7({a ^ m, c ^ n}, key)[i / 8 % 2];
  const std::int64_t draw = j / 8 % 2 == 0 ? word & 0xffffU : word >> 16;
  const std::int64_t kept = kept_of_65536(problem);
  return draw < kept ? 65536.0 / static_cast<double>(kept) : 0.0;
}

// --------------------------------------------------------------------------------------------------- the oracle

namespace {

double dot(const double* x, const double* y, std::int64_t count) { return std::transform_reduce(x, x + count, y, 0.0); }

/// sum += factor · x
void accumulate(double* sum, double factor, const double* x, std::int64_t count) {
  for (std::int64_t c = 0; c < count; ++c) sum[c] += factor * x[c];
}

/// One visible entry of a row of the N×N matrix.
struct Entry {
  std::int64_t key, kv_row;
  double logit, softcap_derivative;
  double dropout;
  double p;
};

class Oracle {
 public:
  explicit Oracle(const Operands& operands) : x_(operands), p_(operands.problem) {
    const std::size_t rows = x_.q.size() / p_.head_dim;
    result_.out.assign(rows * p_.head_dim_v, 0.0);
    result_.lse.assign(rows, -kInfinity);
    if (!p_.backward()) return;
    result_.dq.assign(x_.q.size(), 0.0);
    result_.dk.assign(x_.k.size(), 0.0);
    result_.dv.assign(x_.v.size(), 0.0);
    result_.dbias.assign(x_.bias.values.size(), 0.0);
    result_.dalibi_slopes.assign(x_.alibi_slopes.size(), 0.0);
    result_.dsink.assign(x_.sink.size(), 0.0);
  }

  Results run() {
    for (std::int64_t b = 0; b < p_.batch; ++b) {
      for (std::int64_t h = 0; h < p_.num_q_heads; ++h) {
        for (std::int64_t i = 0; i < x_.sequences[b].len_q; ++i) row(b, h, i);
      }
    }
    return std::move(result_);
  }

 private:
  void row(std::int64_t b, std::int64_t h, std::int64_t i) {
    entries_.clear();
    for (std::int64_t j = 0; j < x_.sequences[b].len_kv; ++j) {
      if (x_.visible(b, h, i, j)) entries_.push_back(score(b, h, i, j));
    }
    const auto weighs = [](const Entry& e) { return e.logit != -kInfinity; };
    if (std::none_of(entries_.begin(), entries_.end(), weighs)) return;  // out 0, lse −inf, no gradients

    const double lse = softmax(p_.sink ? x_.sink[h] : -kInfinity);
    result_.lse[x_.lse_at(b, h, i)] = lse;
    const std::int64_t dv = p_.head_dim_v;
    double* const out = &result_.out[x_.q_row(b, h, i) * dv];
    for (const Entry& e : entries_) accumulate(out, e.p * e.dropout, &x_.v[e.kv_row * dv], dv);
    if (p_.backward()) backward(b, h, i, lse);
  }

  /// s = q·k·scale; s = softcap·tanh(s / softcap); s += alibi + bias
  Entry score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t d = p_.head_dim, kv_row = x_.kv_row(b, h, j);
    const double logit = dot(&x_.q[x_.q_row(b, h, i) * d], &x_.k[kv_row * d], d) * x_.scale();
    Entry e{j, kv_row, logit, 1.0, x_.dropout(b, h, i, j), 0.0};
    if (p_.softcap != 0.0F) {
      const double tanh = std::tanh(e.logit / p_.softcap);
      e.logit = p_.softcap * tanh;
      e.softcap_derivative = 1.0 - tanh * tanh;
    }
    if (p_.alibi != Alibi::kNone) e.logit -= x_.alibi_slopes[x_.slope_at(b, h)] * x_.distance(b, i, j);
    if (x_.bias.present) e.logit += x_.bias.values[x_.bias.at(b, h, i, j)];
    return e;
  }

  /// p = softmax(s), the sink being one more logit; gives lse.
  double softmax(double sink) {
    double max = sink;
    for (const Entry& e : entries_) max = std::max(max, e.logit);
    double sum = p_.sink ? std::exp(sink - max) : 0.0;
    for (const Entry& e : entries_) sum += std::exp(e.logit - max);
    for (Entry& e : entries_) e.p = std::exp(e.logit - max) / sum;  // where lse is large, the sum is lost in it
    return max + std::log(sum);
  }

  void backward(std::int64_t b, std::int64_t h, std::int64_t i, double lse) {
    const std::int64_t d = p_.head_dim, dv = p_.head_dim_v, row = x_.q_row(b, h, i);
    const double dlse = x_.dlse.empty() ? 0.0 : x_.dlse[x_.lse_at(b, h, i)];
    const double* const dout = &x_.dout[row * dv];
    const double delta = dot(dout, &result_.out[row * dv], dv);
    for (const Entry& e : entries_) {
      accumulate(&result_.dv[e.kv_row * dv], e.p * e.dropout, dout, dv);
      const double dp = e.dropout * dot(dout, &x_.v[e.kv_row * dv], dv);
      const double ds = e.p * (dp - delta + dlse);
      if (x_.bias.present) result_.dbias[x_.bias.at(b, h, i, e.key)] += ds;
      if (p_.alibi != Alibi::kNone) result_.dalibi_slopes[x_.slope_at(b, h)] -= ds * x_.distance(b, i, e.key);
      const double dqk = ds * e.softcap_derivative * x_.scale();
      accumulate(&result_.dq[row * d], dqk, &x_.k[e.kv_row * d], d);
      accumulate(&result_.dk[e.kv_row * d], dqk, &x_.q[row * d], d);
    }
    if (p_.sink) result_.dsink[h] += std::exp(x_.sink[h] - lse) * (dlse - delta);
  }

  const Operands& x_;
  const Problem& p_;
  Results result_;
  std::vector<Entry> entries_;  // of the row at hand
};

}  // namespace

Results reference(const Operands& operands) { return Oracle(operands).run(); }

Results reference(const Problem& problem, const Inputs& inputs) { return reference(Operands(problem, inputs)); }

}  // namespace fovea::cpu
