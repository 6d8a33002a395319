#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/elements.h"
#include "dispatch/backend.h"
#include "tools/check.h"

namespace fovea::tools {

using Execute = std::function<void(const Problem&, const Inputs&, const Outputs&, std::byte* workspace)>;

constexpr std::size_t kWorkspaceBytes = 100;

/// A kernel that does what the test says.
class KernelUnderTest final : public PlannedKernel {
 public:
  KernelUnderTest(Problem problem, Execute execute) : problem_(std::move(problem)), execute_(std::move(execute)) {}
  [[nodiscard]] std::size_t workspace_bytes() const override { return kWorkspaceBytes; }
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override { return {}; }
  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* /*stream*/) const override {
    execute_(problem_, inputs, outputs, static_cast<std::byte*>(workspace));
  }

 private:
  Problem problem_;
  Execute execute_;
};

/// Checks a kernel that does what the test says; `options` say where.
inline CheckResult check_kernel(const Problem& problem, std::uint64_t seed, const Execute& execute,
                                CheckOptions options = {}) {
  options.plan = [&](const Problem& asked, Direction pass) {
    Problem one = asked;
    one.direction = pass;
    Report report{
        .problem = one, .device = options.device, .backend = "under test", .workspace_bytes = kWorkspaceBytes};
    return Plan(std::move(report), std::make_shared<KernelUnderTest>(one, execute));
  };
  return check_problem(problem, seed, options);
}

/// Writes the results of the problem's pass.
inline void store(const Outputs& out, const Problem& p, const cpu::Results& results) {
  for (const ResultKind& kind : result_kinds()) {
    if (kind.forward == p.forward()) cpu::store_all(out.*kind.tensor, results.*kind.values);
  }
}

}  // namespace fovea::tools
