// The polynomials that kernels take for softcap's tanh, evaluated as they do, against tanh in double.
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <string>

#include "cuda/planned_call.h"
#include "fovea/problem.h"

namespace fovea::cuda {
namespace {

CallParams params_of(const std::string& softcap) {
  CallParams p{};
  describe_call(parse_problem("fwd bf16 b1 hq1 sq64 d64 softcap=" + softcap), p);
  return p;
}

double capped(const CallParams& p, double s) {
  const double softcap = p.softcap;
  return softcap * std::tanh(s * p.scale / softcap);
}

/// The largest relative error of f over products of both signs up to `most`.
template <class F, class Right>
double worst_of(float most, const F& f, const Right& right) {
  double worst = 0.0;
  constexpr int kSteps = 20000;
  for (int i = -kSteps + 1; i < kSteps; ++i) {
    const float s = most * static_cast<float>(i) / kSteps;
    if (s == 0.0F) continue;
    worst = std::max(worst, std::abs(static_cast<double>(f(s)) / right(s) - 1.0));
  }
  return worst;
}

TEST(Softcap, PolynomialsKeepTheirDigits) {
  for (const std::string softcap :
       {"30", "50 scale=0.3", "0.7 scale=-0.2", "200", "8 scale=1e-3", "0.001 scale=0.01"}) {
    const CallParams p = params_of(softcap);
    ASSERT_GT(p.small_score, 0.0F) << softcap;
    const auto small = [&](float s) {
      const float z = s * s;
      const float* a = p.small_terms;
      return s * std::fma(std::fma(std::fma(a[3], z, a[2]), z, a[1]), z, a[0]);
    };
    EXPECT_LT(worst_of(p.small_score, small, [&](float s) { return capped(p, s) / p.softcap; }), 3e-7) << softcap;

    const auto check_exponent = [&](const CappedExponent& e, int terms, double least, double error) {
      const float most = std::sqrt(e.square);
      EXPECT_EQ(std::exp2(std::round(std::log2(e.square))), e.square) << softcap;
      EXPECT_GT(std::abs(most * p.scale / p.softcap), least) << softcap;
      const auto exponent = [&](float s) {
        const float z = std::fma(s, s, e.square);
        float factor = e.terms[terms - 1];
        for (int i = terms - 2; i >= 0; --i) factor = std::fma(factor, z, e.terms[i]);
        return s * factor;
      };
      EXPECT_LT(worst_of(most, exponent, [&](float s) { return capped(p, s) * std::numbers::log2e; }), error)
          << softcap;
    };
    check_exponent(p.few_terms, 3, 0.17, 7e-7);
    if (softcap == "8 scale=1e-3") {
      EXPECT_EQ(p.more_terms.square, 0.0F) << "the last term is below the least normal number";
    } else {
      check_exponent(p.more_terms, 6, 0.54, 5e-7);
    }
  }
}

TEST(Softcap, ScaleOverItIsFinite) {
  for (const char* softcap : {"1e-38 scale=10", "1e-38 scale=-1e30", "1e-20 scale=1e20", "1e-38"}) {
    const CallParams p = params_of(softcap);
    EXPECT_TRUE(std::isfinite(p.scale * p.per_softcap)) << softcap;
  }
}

TEST(Softcap, NoPolynomialWhereItsTermsAreNoNumbers) {
  for (const char* softcap : {"30 scale=1e-9", "1e30", "5 scale=0"}) {
    const CallParams p = params_of(softcap);
    EXPECT_EQ(p.small_score, 0.0F) << softcap;
    EXPECT_EQ(p.few_terms.square, 0.0F) << softcap;
    EXPECT_EQ(p.more_terms.square, 0.0F) << softcap;
  }
}

}  // namespace
}  // namespace fovea::cuda
