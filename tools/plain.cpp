#include "plain.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/elements.h"

namespace fovea::tools {
namespace {

using cpu::Operands;

std::vector<float> narrow(const std::vector<double>& values) { return {values.begin(), values.end()}; }
std::vector<double> widen(const std::vector<float>& values) { return {values.begin(), values.end()}; }

void accumulate(float* sum, float factor, const float* x, std::int64_t count) {
  for (std::int64_t c = 0; c < count; ++c) sum[c] += factor * x[c];
}

/// One head of one sequence at a time, its matrices [len_q, len_kv] in memory.
class Plain {
  /// Rows of a matrix side by side, so that the products of one vector with all of them need not wait for each other.
  struct Columns {
    std::int64_t rows = 0, width = 0;
    std::vector<float> values;  // [width, rows]
  };

 public:
  explicit Plain(const Operands& x)
      : x_(x),
        p_(x.problem),
        format_(cpu::format_of(p_.dtype)),
        fp32_(p_.dtype == DType::kFloat32),
        scale_(static_cast<float>(x.scale())),
        q_(narrow(x.q)),
        k_(narrow(x.k)),
        v_(narrow(x.v)),
        dout_(narrow(x.dout)),
        out_(q_.size() / p_.head_dim * p_.head_dim_v),
        lse_(q_.size() / p_.head_dim, -std::numeric_limits<float>::infinity()) {
    if (!p_.backward()) return;
    dq_.resize(q_.size());
    dk_.resize(k_.size());
    dv_.resize(v_.size());
    dbias_.resize(x.bias.values.size());
    dslopes_.resize(x.alibi_slopes.size());
    dsink_.resize(x.sink.size());
  }

  cpu::Results run() {
    for (b_ = 0; b_ < p_.batch; ++b_) {
      for (h_ = 0; h_ < p_.num_q_heads; ++h_) {
        forward();
        if (p_.backward()) backward();
      }
    }
    const cpu::FloatFormat bias_format = cpu::format_of(p_.bias_dtype);
    for (float& x : dbias_) x = static_cast<float>(cpu::round_to(bias_format, x));
    for (std::vector<float>* gradient : {&dq_, &dk_, &dv_}) round_all(*gradient);  // summed over a group's heads
    return {widen(out_), widen(lse_),   widen(dq_),      widen(dk_),
            widen(dv_),  widen(dbias_), widen(dslopes_), widen(dsink_)};
  }

 private:
  [[nodiscard]] float round(float x) const { return fp32_ ? x : static_cast<float>(cpu::round_to(format_, x)); }
  void round_all(std::vector<float>& values) const {
    for (float& x : values) x = round(x);
  }

  /// The logit of one entry from its q·k, every step rounded by `to`; `tanh` is kept for the backward pass.
  template <class Round>
  float logit(float qk, std::int64_t i, std::int64_t j, float& tanh, const Round& to) const {
    float s = to(to(qk) * scale_);
    if (p_.softcap != 0.0F) {
      tanh = to(std::tanh(to(s / p_.softcap)));
      s = to(p_.softcap * tanh);
    }
    if (p_.alibi != Alibi::kNone) {
      const auto slope = static_cast<float>(x_.alibi_slopes[x_.slope_at(b_, h_)]);
      s = to(s - to(slope * static_cast<float>(x_.distance(b_, i, j))));
    }
    if (x_.bias.present) s = to(s + to(static_cast<float>(x_.bias.values[x_.bias.at(b_, h_, i, j)])));
    return s;
  }

  /// The keys' rows of k or v, as the head at hand sees them.
  [[nodiscard]] Columns columns(const std::vector<float>& rows, std::int64_t width) const {
    Columns of{x_.sequences[b_].len_kv, width, {}};
    of.values.resize(of.rows * width);
    for (std::int64_t j = 0; j < of.rows; ++j) {
      for (std::int64_t c = 0; c < width; ++c) of.values[c * of.rows + j] = rows[x_.kv_row(b_, h_, j) * width + c];
    }
    return of;
  }

  /// Products of x with all rows, each of which is summed from the first element to the last.
  static void multiply(const float* x, const Columns& y, std::vector<float>& products) {
    std::fill(products.begin(), products.end(), 0.0F);
    for (std::int64_t c = 0; c < y.width; ++c) accumulate(products.data(), x[c], y.values.data() + c * y.rows, y.rows);
  }

  void forward() {
    const cpu::SequenceRows& s = x_.sequences[b_];
    const std::int64_t d = p_.head_dim, dv = p_.head_dim_v, keys = s.len_kv;
    visible_.assign(s.len_q * keys, 0);
    dropout_.assign(s.len_q * keys, 0.0F);
    tanh_.assign(s.len_q * keys, 0.0F);
    weights_.assign(s.len_q * keys, 0.0F);
    p_sink_.assign(s.len_q, 0.0F);
    std::vector<float> scores(keys), exact_scores(keys), products(keys);
    const Columns k = columns(k_, d);
    for (std::int64_t i = 0; i < s.len_q; ++i) {
      const std::int64_t row = i * keys, q_row = x_.q_row(b_, h_, i);
      multiply(&q_[q_row * d], k, products);
      for (std::int64_t j = 0; j < keys; ++j) {
        if (!x_.visible(b_, h_, i, j)) continue;
        visible_[row + j] = 1;
        dropout_[row + j] = static_cast<float>(x_.dropout(b_, h_, i, j));
        float unused = 0.0F;
        exact_scores[j] = logit(products[j], i, j, unused, [](float x) { return x; });
        scores[j] = logit(products[j], i, j, tanh_[row + j], [this](float x) { return round(x); });
      }
      if (!any_visible(i)) continue;
      lse_[x_.lse_at(b_, h_, i)] = softmax(exact_scores, i, false);
      softmax(scores, i, true);
      float* const out = &out_[q_row * dv];
      for (std::int64_t j = 0; j < keys; ++j) {
        if (visible_[row + j] == 0) continue;
        accumulate(out, round(weights_[row + j] * dropout_[row + j]), &v_[x_.kv_row(b_, h_, j) * dv], dv);
      }
      for (std::int64_t c = 0; c < dv; ++c) out[c] = round(out[c]);
    }
  }

  [[nodiscard]] bool any_visible(std::int64_t i) const {
    const std::int64_t keys = x_.sequences[b_].len_kv;
    for (std::int64_t j = 0; j < keys; ++j) {
      if (visible_[i * keys + j] != 0) return true;
    }
    return false;
  }

  /// lse of a row of scores; on request also its weights.
  float softmax(const std::vector<float>& scores, std::int64_t i, bool keep_weights) {
    const std::int64_t keys = x_.sequences[b_].len_kv;
    const float sink = p_.sink ? static_cast<float>(x_.sink[h_]) : -std::numeric_limits<float>::infinity();
    float max = sink;
    for (std::int64_t j = 0; j < keys; ++j) {
      if (visible_[i * keys + j] != 0) max = std::max(max, scores[j]);
    }
    float sum = p_.sink ? std::exp(sink - max) : 0.0F;
    for (std::int64_t j = 0; j < keys; ++j) {
      if (visible_[i * keys + j] != 0) sum += std::exp(scores[j] - max);
    }
    if (keep_weights) {
      for (std::int64_t j = 0; j < keys; ++j) {
        if (visible_[i * keys + j] != 0) weights_[i * keys + j] = round(std::exp(scores[j] - max) / sum);
      }
      if (p_.sink) p_sink_[i] = round(std::exp(sink - max) / sum);
    }
    return max + std::log(sum);
  }

  void backward() {
    const cpu::SequenceRows& s = x_.sequences[b_];
    const std::int64_t d = p_.head_dim, dv = p_.head_dim_v, keys = s.len_kv;
    std::vector<float> dp(keys), dk(keys * d), dv_of_keys(keys * dv);
    const Columns v = columns(v_, dv);
    for (std::int64_t i = 0; i < s.len_q; ++i) {
      if (!any_visible(i)) continue;
      const std::int64_t row = i * keys, q_row = x_.q_row(b_, h_, i);
      const float dlse = x_.dlse.empty() ? 0.0F : static_cast<float>(x_.dlse[x_.lse_at(b_, h_, i)]);
      float delta = 0.0F;
      multiply(&dout_[q_row * dv], v, dp);
      for (std::int64_t j = 0; j < keys; ++j) {
        if (visible_[row + j] == 0) continue;
        dp[j] = round(round(dp[j]) * dropout_[row + j]);
        delta += weights_[row + j] * dp[j];
        accumulate(&dv_of_keys[j * dv], round(weights_[row + j] * dropout_[row + j]), &dout_[q_row * dv], dv);
      }
      for (std::int64_t j = 0; j < keys; ++j) {
        if (visible_[row + j] == 0) continue;
        float ds = round(weights_[row + j] * (dp[j] - delta));
        if (!x_.dlse.empty()) ds = round(ds + round(weights_[row + j] * dlse));
        if (x_.bias.present) dbias_[x_.bias.at(b_, h_, i, j)] += ds;
        if (p_.alibi != Alibi::kNone) {
          dslopes_[x_.slope_at(b_, h_)] -= ds * static_cast<float>(x_.distance(b_, i, j));
        }
        if (p_.softcap != 0.0F) ds = round(ds * round(1.0F - round(tanh_[row + j] * tanh_[row + j])));
        ds = round(ds * scale_);
        accumulate(&dq_[q_row * d], ds, &k_[x_.kv_row(b_, h_, j) * d], d);
        accumulate(&dk[j * d], ds, &q_[q_row * d], d);
      }
      if (p_.sink) {
        float ds = round(p_sink_[i] * -delta);
        if (!x_.dlse.empty()) ds = round(ds + round(p_sink_[i] * dlse));
        dsink_[h_] += ds;
      }
    }
    for (std::int64_t j = 0; j < keys; ++j) {  // each head's product is rounded, then summed over the group
      const std::int64_t kv_row = x_.kv_row(b_, h_, j);
      for (std::int64_t c = 0; c < d; ++c) dk_[kv_row * d + c] += round(dk[j * d + c]);
      for (std::int64_t c = 0; c < dv; ++c) dv_[kv_row * dv + c] += round(dv_of_keys[j * dv + c]);
    }
  }

  const Operands& x_;
  const Problem& p_;
  const cpu::FloatFormat format_;
  const bool fp32_;
  const float scale_;
  std::vector<float> q_, k_, v_, dout_;
  std::vector<float> out_, lse_, dq_, dk_, dv_, dbias_, dslopes_, dsink_;

  // Of the head at hand.
  std::int64_t b_ = 0, h_ = 0;
  std::vector<char> visible_;
  std::vector<float> dropout_, tanh_, weights_;  // [len_q, len_kv]
  std::vector<float> p_sink_;                    // [len_q]
};

}  // namespace

cpu::Results plain(const Operands& operands) { return Plain(operands).run(); }

}  // namespace fovea::tools
