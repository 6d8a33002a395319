#include "error_rule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cpu/elements.h"

namespace fovea::tools {
namespace {

using cpu::Exact;
using cpu::ReferenceResult;

// Roundings after the logits, one for each operation of the formula.  What is rounded on the way to a logit, and the
// logit's difference from lse, is in Exact::sensitivity.
constexpr int kWeights = 1;  // exp
constexpr int kScoreGradient =
    kWeights + 2 + 2 + 2 + 1;  // p·(dout·v − dout·out + dlse): exp, two dot products, −, +, ·
constexpr ResultKind kResults[] = {
    // exp, sum and its reciprocal, then a product with v and their sum
    {"out", true, &ReferenceResult::out, &PlainResult::out, &Outputs::out, kWeights + 2 + 2, 1, 0},
    // exp, sum, log, and the maximum added
    {"lse", true, &ReferenceResult::lse, &PlainResult::lse, &Outputs::lse, kWeights + 3, 0, 0},
    // a product with k or q, their sum, and the scale
    {"dq", false, &ReferenceResult::dq, &PlainResult::dq, &Outputs::dq, kScoreGradient + 3, 1, 1},
    {"dk", false, &ReferenceResult::dk, &PlainResult::dk, &Outputs::dk, kScoreGradient + 3, 1, 1},
    // a product with dout and their sum
    {"dv", false, &ReferenceResult::dv, &PlainResult::dv, &Outputs::dv, kWeights + 2, 1, 0},
    // a sum
    {"dbias", false, &ReferenceResult::dbias, &PlainResult::dbias, &Outputs::dbias, kScoreGradient + 1, 1, 0},
    // a product with the distance, and their sum
    {"dalibi_slopes", false, &ReferenceResult::dalibi_slopes, &PlainResult::dalibi_slopes, &Outputs::dalibi_slopes,
     kScoreGradient + 2, 1, 0},
    // p·(dlse − dout·out) and their sum
    {"dsink", false, &ReferenceResult::dsink, &PlainResult::dsink, &Outputs::dsink, kScoreGradient - 3 + 1, 0, 0},
};

constexpr double kUnit32 = 0x1p-24;

/// How far an element may be off for the roundings alone that no way of computing it avoids.
class Yardstick {
 public:
  Yardstick(const ResultKind& kind, const Problem& p, DType stored)
      : roundings_(kind.roundings + (p.dropout.probability != 0.0F ? kind.for_dropout : 0) +
                   (p.softcap != 0.0F ? kind.for_softcap : 0)),
        // lse never passes through the problem's dtype
        unit_(stored == DType::kFloat32 && kind.forward ? kUnit32 : cpu::format_of(p.dtype).unit_roundoff()),
        stored_(cpu::format_of(stored)) {}

  double operator()(const Exact& exact, std::size_t i) const {
    const double store = stored_.unit_roundoff() * std::max(std::abs(exact.value[i]), stored_.smallest_normal());
    return kUnit32 * (roundings_ * exact.magnitude[i] + exact.sensitivity[i]) + unit_ * exact.magnitude[i] + store;
  }

 private:
  double roundings_, unit_;
  cpu::FloatFormat stored_;
};

/// "[0, 12, 3]": where the element of that number in dense order stands.
std::string place_of(const Tensor& t, std::int64_t index) {
  std::vector<std::int64_t> place(static_cast<std::size_t>(t.rank));
  for (int axis = t.rank - 1; axis >= 0; --axis) {
    place[axis] = index % t.shape[axis];
    index /= t.shape[axis];
  }
  return fmt::format("[{}]", fmt::join(place, ", "));
}

}  // namespace

std::span<const ResultKind> result_kinds() { return kResults; }

Figure judge(const ResultKind& kind, const Problem& problem, const Exact& exact, const std::vector<double>& plain,
             const Tensor& result) {
  const std::vector<double> values = cpu::load_all(result);
  const Yardstick yardstick(kind, problem, result.dtype);
  const auto finite = [&](std::size_t i) { return std::isfinite(exact.value[i]) && exact.magnitude[i] > 0.0; };

  double peer_error = 0.0, peer_relative = 1.0;  // of the plain formula and of the unavoidable, whichever is larger
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!finite(i)) continue;
    const double size = yardstick(exact, i), error = std::abs(plain[i] - exact.value[i]);
    peer_error = std::max({peer_error, size, std::isfinite(error) ? error : 0.0});
    peer_relative = std::max(peer_relative, std::isfinite(error) ? error / size : 0.0);
  }

  Figure figure{kind.name, 0.0, {}};
  for (std::size_t i = 0; i < values.size(); ++i) {
    double ratio = 0.0;
    const double x = values[i], wanted = exact.value[i];
    if (finite(i)) {
      const double error = std::abs(x - wanted);
      ratio = std::max(error / peer_error, error / (peer_relative * yardstick(exact, i)));
      if (std::isnan(ratio)) ratio = HUGE_VAL;
    } else if (std::isnan(wanted) ? std::isfinite(x) : !(x == wanted)) {
      ratio = HUGE_VAL;  // NaN stands where it must, though infinity may stand for it; −inf and untouched 0 are exact
    }
    if (ratio > kMostRatio && ratio > figure.ratio) {
      figure.failure = fmt::format("{}{} is {:.9g} but {:.9g} is right; its error is {:.3g} times that of its peers",
                                   kind.name, place_of(result, static_cast<std::int64_t>(i)), x, wanted, ratio);
    }
    figure.ratio = std::max(figure.ratio, ratio);
  }
  return figure;
}

}  // namespace fovea::tools
