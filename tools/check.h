#pragma once

#include <fovea/plan.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "device_call.h"
#include "error_rule.h"

namespace fovea::tools {

struct CheckOptions {
  Device device{};
  Place* place = nullptr;  ///< on that device, shared with other checks; null: one of its own
  std::string backend{};   ///< empty: who would run the problem anyway
  int num_threads = 0;     ///< 0: a number that depends on the seed

  /// In place of plan_forward and plan_backward, where set: tests put faulty kernels here.
  std::function<Plan(const Problem& problem, Direction pass)> plan{};
};

/// How a problem went.
struct CheckResult {
  std::vector<std::string> backends;  ///< who ran the passes
  std::vector<Figure> figures;        ///< one a result
  std::vector<std::string> failures;  ///< sentences; empty: all is well
  bool run = true;                    ///< false: the GPU had failed in another problem
  [[nodiscard]] bool ok() const { return run && failures.empty(); }
};

/// Runs a problem on hostile data (tools/workload.h) and judges every result by the error rule.  Also: gaps and inputs
/// are left alone, on a GPU what lies around outputs and workspace too, the workspace's content does not matter, and a
/// second run gives the same bits where the contract promises it.  A refusal or failure of the library is a failure of
/// the check; memory that ran out is not, and throws Error(kOutOfMemory).
[[nodiscard]] CheckResult check_problem(const Problem& problem, std::uint64_t seed, const CheckOptions& options = {});

/// What `fovea check` was asked for.
struct CheckRun {
  std::vector<Problem> problems;  ///< given ones, or
  std::int64_t random = 0;        ///< so many random problems
  std::int64_t kinds = 0;         ///< of not more kinds than this (random_problem.h); 0: any
  std::uint64_t seed = 1;
  bool list = false;   ///< print the lines, and check nothing
  bool pairs = false;  ///< print how often each two options came together
  int jobs = 0;        ///< problems at once; 0: as many as the process may use threads
  CheckOptions options;
};

/// Prints one line a problem and a summary.  0, or 1 where a problem failed.  Throws Error for a line that is not
/// understood, for a backend or a variable of the environment that is wrong, and where memory runs out.
[[nodiscard]] int run_check(const CheckRun& run);

}  // namespace fovea::tools
