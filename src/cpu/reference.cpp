#include "cpu/reference.h"

#include <cmath>
#include <limits>

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
std::int64_t diagonal_offset(const Problem& problem, const Sequence& s) {
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
      dout(load_all(in.dout)),
      dlse(load_all(in.dlse)),
      mask(load_matrix(in.mask)),
      bias(load_matrix(in.bias)) {
  const std::vector<std::int64_t> starts_q = load_integers(in.cu_seqlens_q),
                                  starts_kv = load_integers(in.cu_seqlens_kv);
  const std::vector<std::int64_t> q_lengths = load_integers(in.q_lengths), kv_lengths = load_integers(in.kv_lengths);
  for (std::int64_t b = 0; b < p.batch; ++b) {
    Sequence s{b * p.seqlen_q, p.seqlen_q, 0, b * p.seqlen_kv, p.seqlen_kv, 0};
    if (p.packed()) {
      s = {starts_q[b], starts_q[b + 1] - starts_q[b], 0, starts_kv[b], starts_kv[b + 1] - starts_kv[b], 0};
    }
    s.len_q = q_lengths.empty() ? s.slot_q : q_lengths[b];
    s.len_kv = kv_lengths.empty() ? s.slot_kv : kv_lengths[b];
    sequences.push_back(s);
  }
  if (p.dropout.probability == 0.0F) return;
  const std::uint64_t seed = p.dropout.seed, offset = p.dropout.offset;
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
  const Sequence& s = sequences[b];
  if (i >= s.len_q || j >= s.len_kv) return false;
  const std::int64_t after = j - (i + diagonal_offset(problem, s));  // of the diagonal
  if (problem.causal != Causal::kNone && after > 0) return false;
  if (problem.window_right && after > *problem.window_right) return false;
  if (problem.window_left && -after > *problem.window_left) return false;
  if (mask.present && mask.values[mask.at(b, h, i, j)] == 0.0) return false;
  return !(bias.present && bias.values[bias.at(b, h, i, j)] == -kInfinity);
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

/// A factor of a sum together with its yardsticks (docs/error_rule.md).
struct Factor {
  double value, magnitude, sensitivity;
  [[nodiscard]] Factor times(double x) const { return {value * x, magnitude * std::abs(x), sensitivity * std::abs(x)}; }
};

/// sum[at + c] += factor · x[c]
void accumulate(Exact& sum, std::int64_t at, const Factor& factor, const double* x, std::int64_t count) {
  double* const value = sum.value.data() + at;
  double* const magnitude = sum.magnitude.data() + at;
  double* const sensitivity = sum.sensitivity.data() + at;
  for (std::int64_t c = 0; c < count; ++c) {
    value[c] += factor.value * x[c];
    magnitude[c] += factor.magnitude * std::abs(x[c]);
    sensitivity[c] += factor.sensitivity * std::abs(x[c]);
  }
}

Exact zeros(std::size_t count) {
  return {std::vector<double>(count), std::vector<double>(count), std::vector<double>(count)};
}

/// A sum of products and the sum of their sizes.
struct Dot {
  double value = 0.0, magnitude = 0.0;
  Dot(const double* x, const double* y, std::int64_t count) {
    for (std::int64_t c = 0; c < count; ++c) {
      value += x[c] * y[c];
      magnitude += std::abs(x[c] * y[c]);
    }
  }
};

/// One visible entry of a row of the N×N matrix.
struct Entry {
  std::int64_t key, kv_row;
  double logit, logit_size;   // the logit, and the size of all that was rounded on the way to it
  double derivative, square;  // of the softcap: 1 − tanh² and tanh²
  double dropout;
  Factor p;
};

class Oracle {
 public:
  explicit Oracle(const Operands& operands) : x_(operands), p_(operands.problem), scale_(operands.scale()) {
    const auto rows = static_cast<std::int64_t>(x_.q.size()) / p_.head_dim;
    result_.out = zeros(static_cast<std::size_t>(rows * p_.head_dim_v));
    result_.lse = zeros(static_cast<std::size_t>(rows));
    result_.lse.value.assign(static_cast<std::size_t>(rows), -kInfinity);
    if (!p_.backward()) return;
    result_.dq = zeros(x_.q.size());
    result_.dk = zeros(x_.k.size());
    result_.dv = zeros(x_.v.size());
    result_.dbias = zeros(x_.bias.values.size());
    result_.dalibi_slopes = zeros(x_.alibi_slopes.size());
    result_.dsink = zeros(x_.sink.size());
  }

  ReferenceResult run() {
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
    if (entries_.empty()) return;  // out 0, lse −inf, no gradients
    softmax(b, h, i);
    const std::int64_t out_at = x_.q_row(b, h, i) * p_.head_dim_v;
    for (const Entry& e : entries_) {
      accumulate(result_.out, out_at, e.p.times(e.dropout), &x_.v[e.kv_row * p_.head_dim_v], p_.head_dim_v);
    }
    if (p_.backward()) backward(b, h, i);
  }

  Entry score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    Entry e{j, x_.kv_row(b, h, j), 0.0, 0.0, 1.0, 0.0, x_.dropout(b, h, i, j), {}};
    const Dot qk(&x_.q[x_.q_row(b, h, i) * p_.head_dim], &x_.k[e.kv_row * p_.head_dim], p_.head_dim);
    e.logit = scale_ * qk.value;
    e.logit_size = std::abs(scale_) * qk.magnitude + std::abs(e.logit);
    if (p_.softcap != 0.0F) {
      const double cap = p_.softcap, tanh = std::tanh(e.logit / cap);
      e.square = tanh * tanh;
      e.derivative = 1.0 - e.square;
      e.logit = cap * tanh;
      e.logit_size = e.derivative * e.logit_size + 2.0 * std::abs(e.logit);
    }
    if (p_.alibi != Alibi::kNone) {
      const double alibi = x_.alibi_slopes[x_.slope_at(b, h)] * x_.distance(b, i, j);
      e.logit -= alibi;
      e.logit_size += std::abs(alibi) + std::abs(e.logit);
    }
    if (x_.bias.present) {
      e.logit += x_.bias.values[x_.bias.at(b, h, i, j)];
      e.logit_size += std::abs(e.logit);
    }
    return e;
  }

  /// lse and p of the row, and what one rounding in the exponents moves of each.
  void softmax(std::int64_t b, std::int64_t h, std::int64_t i) {
    double max = p_.sink ? x_.sink[h] : -kInfinity, sum = 0.0;
    for (const Entry& e : entries_) max = std::max(max, e.logit);
    for (const Entry& e : entries_) sum += std::exp(e.logit - max);
    if (p_.sink) sum += std::exp(x_.sink[h] - max);
    const double lse = max + std::log(sum);

    exponents_ = std::abs(lse);
    for (Entry& e : entries_) {
      e.p.value = std::exp(e.logit - lse);
      exponents_ += e.p.value * e.logit_size;
    }
    const double p_sink = p_.sink ? std::exp(x_.sink[h] - lse) : 0.0;
    sink_ = {p_sink, p_sink, p_sink == 0.0 ? 0.0 : p_sink * std::abs(x_.sink[h])};
    exponents_ += sink_.sensitivity;
    sink_.sensitivity += p_sink * exponents_ + kLostProbability;
    for (Entry& e : entries_) {
      e.p.magnitude = e.p.value + smallest_;
      e.p.sensitivity = e.p.value * (e.logit_size + exponents_) + kLostProbability;
    }
    const std::int64_t at = x_.lse_at(b, h, i);
    result_.lse.value[at] = lse;
    result_.lse.magnitude[at] = 1.0;
    result_.lse.sensitivity[at] = exponents_;
  }

  void backward(std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t d = p_.head_dim, dv = p_.head_dim_v, row = x_.q_row(b, h, i);
    const double one = 1.0, dlse = x_.dlse.empty() ? 0.0 : x_.dlse[x_.lse_at(b, h, i)];
    const double* const dout = &x_.dout[row * dv];
    const double delta = Dot(dout, &result_.out.value[row * dv], dv).value;
    const double delta_size = Dot(dout, &result_.out.magnitude[row * dv], dv).magnitude;
    for (const Entry& e : entries_) {
      accumulate(result_.dv, e.kv_row * dv, e.p.times(e.dropout), dout, dv);

      const Dot dp(dout, &x_.v[e.kv_row * dv], dv);  // before dropout
      const double size = e.dropout * dp.magnitude + delta_size + std::abs(dlse);
      const Factor ds{e.p.value * (e.dropout * dp.value - delta + dlse), e.p.value * size + smallest_,
                      e.p.sensitivity * size + kLostProbability};
      if (x_.bias.present) {
        accumulate(result_.dbias, static_cast<std::int64_t>(x_.bias.at(b, h, i, e.key)), ds, &one, 1);
      }
      if (p_.alibi != Alibi::kNone) {
        const double distance = -x_.distance(b, i, e.key);
        accumulate(result_.dalibi_slopes, x_.slope_at(b, h), ds, &distance, 1);
      }

      Factor dx = ds.times(e.derivative * scale_);  // of q·k
      dx.magnitude += smallest_;
      dx.sensitivity += 4.0 * e.square * ds.magnitude * std::abs(scale_);  // 1 − tanh² forgets what tanh was
      accumulate(result_.dq, row * d, dx, &x_.k[e.kv_row * d], d);
      accumulate(result_.dk, e.kv_row * d, dx, &x_.q[row * d], d);
    }
    if (p_.sink) {
      const double size = delta_size + std::abs(dlse);
      accumulate(result_.dsink, h, {sink_.value * (dlse - delta), sink_.magnitude * size, sink_.sensitivity * size},
                 &one, 1);
    }
  }

  // Probabilities below 2^-126 may become 0 in fp32; a rounding counts 2^-24.
  static constexpr double kLostProbability = 0x1p-102;

  const Operands& x_;
  const Problem& p_;
  const double scale_;
  const double smallest_ = format_of(p_.dtype).smallest_normal();  // below it a stored number loses digits
  ReferenceResult result_;

  // Of the row at hand.
  std::vector<Entry> entries_;
  Factor sink_{};
  double exponents_ = 0.0;  // what one rounding in the exponents moves lse by
};

}  // namespace

ReferenceResult reference(const Operands& operands) { return Oracle(operands).run(); }

ReferenceResult reference(const Problem& problem, const Inputs& inputs) { return reference(Operands(problem, inputs)); }

}  // namespace fovea::cpu
