#include "roundings.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>

#include "cpu/elements.h"

namespace fovea::tools {
namespace {

// Numbers below the smallest normal one may become 0 in fp32: what is lost then, in units of 2^-24.
constexpr double kSmallest = 0x1p-126, kLost = 0x1p24 * kSmallest;
double lost(double value) { return value == 0.0 ? 0.0 : kLost; }

/// Roundings are independent, so their errors add up in squares.
double together(std::initializer_list<double> errors) {
  double squares = 0.0;
  for (const double error : errors) squares += error * error;
  return std::sqrt(squares);
}

/// A number and how far it may be off: see Rounding.
struct Rounded {
  double value = 0.0, computed = 0.0, stored = 0.0;
  [[nodiscard]] Rounded times(double x) const { return {value * x, computed * std::abs(x), stored * std::abs(x)}; }
  [[nodiscard]] Rounded with(double more_computed, double more_stored) const {
    return {value, together({computed, more_computed}), together({stored, more_stored})};
  }
};

// What most of the tests' time goes into: as wide as the processor allows.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FOVEA_WIDE [[gnu::target_clones("avx2", "default")]]
#else
#define FOVEA_WIDE
#endif
constexpr int kLanes = 4;  // partial sums that do not wait for each other

struct DotSums {
  double value, squares, kept_squares;
};
FOVEA_WIDE DotSums dot_sums(const double* x, const double* y, std::int64_t count, double smallest) {
  double values[kLanes] = {}, squares[kLanes] = {}, kept_squares[kLanes] = {};
  const auto add = [&](int lane, std::int64_t c) {
    const double term = x[c] * y[c], kept = x[c] * std::max(std::abs(y[c]), smallest);
    values[lane] += term;
    squares[lane] += term * term;
    kept_squares[lane] += kept * kept;
  };
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole; c += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) add(lane, c + lane);
  }
  for (std::int64_t c = whole; c < count; ++c) add(0, c);
  const auto sum = [](const double(&of)[kLanes]) { return (of[0] + of[1]) + (of[2] + of[3]); };
  return {sum(values), sum(squares), sum(kept_squares)};
}

/// Of the terms factor · x[c] of one row: the factors of a square, and of what is not one.
struct Term {
  std::int64_t at;
  double computed, stored, squares, size;
  const double* x;
};

template <int kColumns>
struct ColumnSums {
  double computed[kColumns] = {}, stored[kColumns] = {}, squares[kColumns] = {}, sizes[kColumns] = {};
  ColumnSums(const Term* terms, std::int64_t count, std::int64_t c) {
    for (const Term* term = terms; term != terms + count; ++term) {
      for (int lane = 0; lane < kColumns; ++lane) {
        const double x = term->x[c + lane], square = x * x;
        computed[lane] += term->computed * square;
        stored[lane] += term->stored * square;
        squares[lane] += term->squares * square;
        sizes[lane] += term->size * std::abs(x);
      }
    }
  }
};
FOVEA_WIDE ColumnSums<kLanes> wide_column_sums(const Term* terms, std::int64_t count, std::int64_t c) {
  return {terms, count, c};
}

/// A sum of products, what its additions cost, and what storing its second operand costs in a format that keeps all
/// digits of the numbers from `smallest`.
struct Dot : Rounded {
  Dot(const double* x, const double* y, std::int64_t count, double smallest) {
    const DotSums sums = dot_sums(x, y, count, smallest);
    value = sums.value;
    // Each addition rounds a partial sum; the square of those, averaged over all orders of the terms.
    computed = std::sqrt(static_cast<double>(count) * (sums.squares / 6.0 + value * value / 3.0));
    // Stored elements round at random, or all alike: v · 1.001 rounds back to v.
    stored = std::sqrt(sums.kept_squares + value * value);
  }
};

/// The elements of one result: sums of many terms, in an order that is nobody's business, so that each addition may
/// round a sum as large as the final one or as the root of all squares.
class Sums {
 public:
  /// Of rows of `width` elements.
  Sums(const std::vector<double>& exact, std::int64_t width)
      : exact_(exact),
        width_(width),
        computed_(exact.size()),
        stored_(exact.size()),
        squares_(exact.size()),
        terms_(exact.size()),
        sizes_(exact.size()) {}

  /// The terms factor · x[c], independent of all others, of the row that begins at `at`; counted by `settle`.
  void add(std::int64_t at, const Rounded& factor, const double* x) {
    terms_of_rows_.push_back({at, factor.computed * factor.computed, factor.stored * factor.stored,
                              factor.value * factor.value, std::abs(factor.value) + factor.computed + factor.stored,
                              x});
  }
  /// Row by row, whose sums then are fetched and stored once for all of its terms.
  void settle() {
    const auto begin = terms_of_rows_.begin(), end = terms_of_rows_.end();
    std::stable_sort(begin, end, [](const Term& a, const Term& b) { return a.at < b.at; });
    for (auto first = begin; first != end;) {
      const auto last = std::find_if(first, end, [&](const Term& term) { return term.at != first->at; });
      std::int64_t c = 0;
      const std::int64_t count = last - first;
      for (; c + kLanes <= width_; c += kLanes) add(first->at + c, count, wide_column_sums(&*first, count, c));
      for (; c < width_; ++c) add(first->at + c, count, ColumnSums<1>(&*first, count, c));
      first = last;
    }
    terms_of_rows_.clear();
  }

  /// An error that many terms of one element share.
  void share(std::int64_t at, double computed, double stored) {
    computed_[at] += computed * computed;
    stored_[at] += stored * stored;
  }

  /// Of an element, when all its terms are there.
  [[nodiscard]] double computed(std::size_t i) const {
    return std::sqrt(computed_[i] + terms_[i] * std::max(squares_[i], exact_[i] * exact_[i]));
  }

  Rounding finish() && {
    for (std::size_t i = 0; i < exact_.size(); ++i) {
      computed_[i] = computed(i);
      if (sizes_[i] > 0.0) computed_[i] = std::max(computed_[i], kLost);
      stored_[i] = std::sqrt(stored_[i]);
    }
    return {std::move(computed_), std::move(stored_)};
  }

 private:
  template <int kColumns>
  void add(std::int64_t at, std::int64_t count, const ColumnSums<kColumns>& sums) {
    for (int lane = 0; lane < kColumns; ++lane) {
      const std::int64_t i = at + lane;
      computed_[i] += sums.computed[lane];
      stored_[i] += sums.stored[lane];
      squares_[i] += sums.squares[lane];
      terms_[i] += static_cast<double>(count);
      sizes_[i] += sums.sizes[lane];
    }
  }

  const std::vector<double>& exact_;
  const std::int64_t width_;
  std::vector<double> computed_, stored_;  // squares of the errors
  std::vector<double> squares_, terms_;    // of the terms, and their number
  std::vector<double> sizes_;  // of the terms with their errors: where that is 0, however small it may be, 0 is exact
  std::vector<Term> terms_of_rows_;  // that are not settled yet
};

/// One visible entry of a row of the N×N matrix.
struct Entry {
  std::int64_t key, kv_row;
  double logit, logit_error;
  double derivative, derivative_error;  // of the softcap
  double dropout;
  Rounded p;  // apart from lse's error, which the row shares
};

class Bookkeeper {
  static constexpr std::int64_t kTogether = 16;  // rows, whose terms of dk and dv are added while those are cached
  static constexpr double kOne = 1.0;

 public:
  Bookkeeper(const cpu::Operands& operands, const cpu::Results& exact, bool own_out)
      : x_(operands),
        exact_(exact),
        own_out_(own_out),
        p_(operands.problem),
        scale_(operands.scale()),
        out_(exact.out, p_.head_dim_v),
        dq_(exact.dq, p_.head_dim),
        dk_(exact.dk, p_.head_dim),
        dv_(exact.dv, p_.head_dim_v),
        dbias_(exact.dbias, 1),
        dalibi_slopes_(exact.dalibi_slopes, 1),
        dsink_(exact.dsink, 1),
        lse_{std::vector<double>(exact.lse.size()), std::vector<double>(exact.lse.size())} {}

  Roundings run() {
    for (std::int64_t b = 0; b < p_.batch; ++b) {
      for (std::int64_t h = 0; h < p_.num_q_heads; ++h) {
        for (std::int64_t i = 0; i < x_.sequences[b].len_q; ++i) {
          row(b, h, i);
          if (i % kTogether == kTogether - 1 || i + 1 == x_.sequences[b].len_q) settle();
        }
      }
    }
    return {std::move(out_).finish(),
            std::move(lse_),
            std::move(dq_).finish(),
            std::move(dk_).finish(),
            std::move(dv_).finish(),
            std::move(dbias_).finish(),
            std::move(dalibi_slopes_).finish(),
            std::move(dsink_).finish()};
  }

 private:
  void settle() {
    for (Sums* sums : {&dq_, &dk_, &dv_, &dbias_, &dalibi_slopes_, &dsink_}) sums->settle();
  }

  void row(std::int64_t b, std::int64_t h, std::int64_t i) {
    entries_.clear();
    for (std::int64_t j = 0; j < x_.sequences[b].len_kv; ++j) {
      if (!x_.visible(b, h, i, j)) continue;
      const Entry entry = score(b, h, i, j);
      if (entry.logit != -std::numeric_limits<double>::infinity()) entries_.push_back(entry);  // else it weighs nothing
    }
    if (entries_.empty()) return;
    softmax(b, h, i);
    const std::int64_t dv = p_.head_dim_v, at = x_.q_row(b, h, i) * dv;
    for (const Entry& e : entries_) out_.add(at, dropped(e), &x_.v[e.kv_row * dv]);
    out_.settle();
    for (std::int64_t c = at; c < at + dv; ++c) out_.share(c, lse_error_ * exact_.out[c], 0.0);
    if (p_.backward()) backward(b, h, i);
  }

  Entry score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    Entry e{j, x_.kv_row(b, h, j), 0.0, 0.0, 1.0, 0.0, x_.dropout(b, h, i, j), {}};
    const Dot qk(&x_.q[x_.q_row(b, h, i) * p_.head_dim], &x_.k[e.kv_row * p_.head_dim], p_.head_dim, smallest_);
    e.logit = scale_ * qk.value;
    e.logit_error = together({scale_ * qk.computed, e.logit});  // the dot product; the scale
    if (p_.softcap != 0.0F) {
      const double cap = p_.softcap, tanh = std::tanh(e.logit / cap);
      e.derivative = 1.0 - tanh * tanh;  // 0: an infinite score is capped like a large one
      const double moved = e.derivative == 0.0 ? 0.0 : e.derivative * together({e.logit_error, e.logit}) / cap;
      const double tanh_error = together({moved, tanh});
      e.logit = cap * tanh;
      e.logit_error = together({cap * tanh_error, e.logit});
      e.derivative_error = together({2.0 * tanh * tanh_error, tanh * tanh, e.derivative});  // tanh, square, difference
    }
    if (p_.alibi != Alibi::kNone) {
      const double alibi = x_.alibi_slopes[x_.slope_at(b, h)] * x_.distance(b, i, j);
      e.logit -= alibi;
      e.logit_error = together({e.logit_error, alibi, e.logit});  // product, difference
    }
    if (x_.bias.present) {
      e.logit += x_.bias.values[x_.bias.at(b, h, i, j)];
      e.logit_error = together({e.logit_error, e.logit});  // sum
    }
    return e;
  }

  /// The weights of the row, and what lse may be off.
  void softmax(std::int64_t b, std::int64_t h, std::int64_t i) {
    const double lse = exact_.lse[x_.lse_at(b, h, i)];
    double squares = lse * lse + 1.0;  // the maximum added, and the logarithm
    double alike = 0.0;                // constants (scale, the conversion to base 2) round every exponent alike
    for (Entry& e : entries_) {
      e.p = weight(e.logit, e.logit_error, lse);
      const double exponential = e.p.value * together({e.logit_error, 1.0});
      squares += exponential * exponential + 1.0;  // an addition rounds a sum of at most 1
      alike += e.p.value * (std::abs(e.logit) + std::abs(e.logit - lse));
    }
    lse_error_ = std::sqrt(squares) + alike;
    lse_.computed[x_.lse_at(b, h, i)] = lse_error_;
  }

  [[nodiscard]] Rounded weight(double logit, double logit_error, double lse) const {
    const double p = std::exp(logit - lse), exponent = logit - lse;
    // The difference, its conversion to base 2, exp, and division by the sum.
    const double relative = together({logit_error, exponent, exponent, 1.0, 1.0});
    return {p, p * relative + kLost, p + smallest_};
  }

  void backward(std::int64_t b, std::int64_t h, std::int64_t i) {
    const std::int64_t d = p_.head_dim, dv = p_.head_dim_v, row = x_.q_row(b, h, i);
    const double dlse = x_.dlse.empty() ? 0.0 : x_.dlse[x_.lse_at(b, h, i)];
    const double* const dout = &x_.dout[row * dv];
    Dot delta(dout, &exact_.out[row * dv], dv, smallest_);
    delta.stored = std::max(delta.stored, moved_by_rounding(dout, &exact_.out[row * dv]));
    if (own_out_) {
      for (std::int64_t c = 0; c < dv; ++c)
        delta.computed = together({delta.computed, dout[c] * out_.computed(static_cast<std::size_t>(row * dv + c))});
    }
    const std::int64_t slope = x_.slope_at(b, h);
    const bool one_bias = x_.bias.present && x_.bias.strides[3] == 0;  // for all keys of the row
    double sum_p = 0.0, sum_ds = 0.0, far_p = 0.0, far_ds = 0.0;       // the latter times the distance
    pulled_.assign(static_cast<std::size_t>(d), 0.0);

    for (const Entry& e : entries_) {
      const Rounded weight = dropped(e);
      dv_.add(e.kv_row * dv, weight.with(lse_error_ * weight.value, 0.0), dout);

      const Dot dp(dout, &x_.v[e.kv_row * dv], dv, smallest_);  // before dropout
      const Rounded ds =
          score_gradient(e.p, e.dropout * dp.value, e.dropout * together({dp.computed, dp.value}), delta.value, dlse);
      const auto alone = [&](const Rounded& own, double p) {  // with what the row's entries share
        return own.with(together({lse_error_ * own.value, delta.computed * p}), delta.stored * p);
      };
      if (x_.bias.present) {
        const auto at = static_cast<std::int64_t>(x_.bias.at(b, h, i, e.key));
        dbias_.add(at, one_bias ? ds : alone(ds, e.p.value), &kOne);
        sum_p += e.p.value;
        sum_ds += ds.value;
      }
      if (p_.alibi != Alibi::kNone) {
        const double distance = x_.distance(b, i, e.key);
        dalibi_slopes_.add(slope, ds.times(distance), &kOne);
        far_p += e.p.value * distance;
        far_ds += ds.value * distance;
      }

      const double factor = e.derivative * scale_, p = e.p.value * factor;
      Rounded dqk = ds.times(factor);
      dqk.computed =
          together({dqk.computed, dqk.value, dqk.value, ds.value * scale_ * e.derivative_error, lost(dqk.value)});
      dk_.add(e.kv_row * d, alone(dqk, p), &x_.q[row * d]);
      const double* const k = &x_.k[e.kv_row * d];
      dq_.add(row * d, dqk, k);
      for (std::int64_t c = 0; c < d; ++c) pulled_[c] += p * k[c];
    }

    // What lse and delta are off moves all entries of the row together.
    const auto share = [&](Sums& sums, std::int64_t at, double of_lse, double of_delta) {
      sums.share(at, together({lse_error_ * of_lse, delta.computed * of_delta}), delta.stored * of_delta);
    };
    for (std::int64_t c = 0; c < d; ++c) share(dq_, row * d + c, exact_.dq[row * d + c], pulled_[c]);
    if (one_bias) share(dbias_, static_cast<std::int64_t>(x_.bias.at(b, h, i, 0)), sum_ds, sum_p);
    if (p_.alibi != Alibi::kNone) share(dalibi_slopes_, slope, far_ds, far_p);
    if (p_.sink && !std::isinf(x_.sink[h])) {
      const Rounded p = weight(x_.sink[h], 0.0, exact_.lse[x_.lse_at(b, h, i)]);
      const Rounded ds = score_gradient(p, 0.0, 0.0, delta.value, dlse);
      dsink_.add(h, ds.with(together({lse_error_ * ds.value, delta.computed * p.value}), delta.stored * p.value),
                 &kOne);
    }
  }

  /// What the rounding of `out` moves delta, in unit roundoffs: no chance, because what is alike rounds alike.  Where
  /// one key has all the weight and dropout scales it by 1.003, all of v that begins with 1.0 to 1.3 rounds back to v.
  [[nodiscard]] double moved_by_rounding(const double* dout, const double* out) const {
    const cpu::FloatFormat dtype = cpu::format_of(p_.dtype);
    double moved = 0.0;
    for (std::int64_t c = 0; c < p_.head_dim_v; ++c) moved += dout[c] * (cpu::round_to(dtype, out[c]) - out[c]);
    return std::isfinite(moved) ? std::abs(moved) / dtype.unit_roundoff() : 0.0;
  }

  /// p·(dp − delta + dlse), apart from the errors of delta and lse.
  [[nodiscard]] Rounded score_gradient(const Rounded& p, double dp, double dp_error, double delta, double dlse) const {
    const double difference = dp - delta, sum = difference + dlse;
    const double sum_error = (p.value + kSmallest) * together({dp_error, difference, sum});
    return {p.value * sum, together({p.computed * sum, sum_error, p.value * sum, lost(p.value * sum)}),
            p.stored * std::abs(sum) + smallest_};
  }

  /// The entry's weight behind dropout.
  [[nodiscard]] static Rounded dropped(const Entry& e) {
    const Rounded p = e.p.times(e.dropout);
    return e.dropout == 1.0 ? p : p.with(p.value, 0.0);
  }

  const cpu::Operands& x_;
  const cpu::Results& exact_;
  const bool own_out_;
  const Problem& p_;
  const double scale_;
  const double smallest_ = cpu::format_of(p_.dtype).smallest_normal();  // below it a stored number loses digits
  Sums out_, dq_, dk_, dv_, dbias_, dalibi_slopes_, dsink_;
  Rounding lse_;

  // Of the row at hand.
  std::vector<Entry> entries_;
  double lse_error_ = 0.0;
  std::vector<double> pulled_;  // Σ of weight · k · what scales dq: how delta moves dq
};

}  // namespace

Roundings roundings(const cpu::Operands& operands, const cpu::Results& exact, bool own_out) {
  return Bookkeeper(operands, exact, own_out).run();
}

}  // namespace fovea::tools
