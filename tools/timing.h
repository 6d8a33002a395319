#pragma once

#include <fovea/plan.h>

#include <functional>
#include <span>
#include <vector>

namespace fovea::tools {

/// The times of repeated executions, in seconds, fastest first.
struct Timing {
  std::vector<double> seconds;

  [[nodiscard]] double quantile(double share) const;  ///< 0: fastest, 0.5: median, 1: slowest
  [[nodiscard]] double median() const { return quantile(0.5); }
};

/// How long to measure each contender: exactly `repeats` executions, or with 0 as many as fit into `seconds`, at least
/// 3; one is enough where it alone takes longer than `seconds`.
struct Effort {
  int repeats = 0;
  double seconds = 1.0;
};

/// Times contenders in turns, so that what disturbs the machine disturbs them alike, after one execution each that is
/// not counted.  A contender executes once and says how long that took; `progress` hears the share done.
[[nodiscard]] std::vector<Timing> measure(std::span<const std::function<double()>> contenders, const Effort& effort,
                                          const std::function<void(double)>& progress = {});

/// Bytes of the tensors that one pass reads and writes, each element once.
[[nodiscard]] double traffic_bytes(Direction pass, const Inputs& inputs, const Outputs& outputs);

/// A problem's floating-point operations in one pass.
[[nodiscard]] double flops_of(Problem problem, Direction pass);

}  // namespace fovea::tools
