#include "error_rule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu/elements.h"
#include "plain.h"

namespace fovea::tools {
namespace {

using cpu::Results;

constexpr ResultKind kResults[] = {
    {"out", true, &Results::out, &Roundings::out, &Outputs::out},
    {"lse", true, &Results::lse, &Roundings::lse, &Outputs::lse},
    {"dq", false, &Results::dq, &Roundings::dq, &Outputs::dq},
    {"dk", false, &Results::dk, &Roundings::dk, &Outputs::dk},
    {"dv", false, &Results::dv, &Roundings::dv, &Outputs::dv},
    {"dbias", false, &Results::dbias, &Roundings::dbias, &Outputs::dbias},
    {"dalibi_slopes", false, &Results::dalibi_slopes, &Roundings::dalibi_slopes, &Outputs::dalibi_slopes},
    {"dsink", false, &Results::dsink, &Roundings::dsink, &Outputs::dsink},
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

Peers::Peers(const cpu::Operands& operands, cpu::Results results, bool own_out)
    : dtype(operands.problem.dtype),
      exact(std::move(results)),
      plain(tools::plain(operands)),
      unavoidable(roundings(operands, exact, own_out)) {}

Figure judge(const ResultKind& kind, const Peers& peers, const Tensor& result) {
  const std::vector<double> values = cpu::load_all(result);
  const std::vector<double>&exact = peers.exact.*kind.values, &plain = peers.plain.*kind.values;
  const Rounding& rounding = peers.unavoidable.*kind.rounding;
  const cpu::FloatFormat dtype = cpu::format_of(peers.dtype), stored = cpu::format_of(result.dtype);
  const auto finite = [&](std::size_t i) { return std::isfinite(exact[i]) && rounding.computed[i] > 0.0; };
  // The root of the squares bounds most sums of roundings, twice of it all but a few in a million.
  const auto yardstick = [&](std::size_t i) {
    return 2.0 * 0x1p-24 * rounding.computed[i] + dtype.unit_roundoff() * rounding.stored[i] +
           stored.unit_roundoff() * std::max(std::abs(exact[i]), stored.smallest_normal());
  };

  double peer_error = 0.0, peer_relative = 1.0;  // of the plain formula and of the unavoidable, whichever is larger
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!finite(i)) continue;
    const double size = yardstick(i), error = std::abs(plain[i] - exact[i]);
    peer_error = std::max({peer_error, size, std::isfinite(error) ? error : 0.0});
    peer_relative = std::max(peer_relative, std::isfinite(error) ? error / size : 0.0);
  }

  Figure figure{kind.name, 0.0, {}};
  for (std::size_t i = 0; i < values.size(); ++i) {
    double ratio = 0.0;
    const double x = values[i], wanted = exact[i];
    if (finite(i)) {
      const double error = std::abs(x - wanted);
      ratio = std::max(error / peer_error, error / (peer_relative * yardstick(i)));
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
