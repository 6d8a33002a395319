#include <fovea/plan.h>

#include "dispatch/backend.h"
#include "problem/refuse.h"
#include "problem/validate.h"

namespace fovea {
namespace {

std::string reasons_of(const Verdict& verdict) {
  std::string text;
  for (const std::string& reason : verdict.reasons) text += (text.empty() ? "" : ", ") + reason;
  return text;
}

/// "a: reason, reason; b: reason".
std::string all_reasons(const std::vector<Verdict>& verdicts) {
  std::string text;
  for (const Verdict& verdict : verdicts) {
    if (!verdict.reasons.empty()) text += (text.empty() ? "" : "; ") + verdict.backend + ": " + reasons_of(verdict);
  }
  return text;
}

/// Strict mode: refuses where a preferred backend of this device was passed over because of the problem.
void refuse_second_choice(const Report& report) {
  for (const Verdict& verdict : report.verdicts) {
    if (verdict.backend == report.backend) return;
    if (verdict.available) {
      throw Error(ErrorCode::kUnsupported, "strict mode: " + report.backend + " would run '" +
                                               to_string(report.problem) + "' because " + all_reasons({verdict}));
    }
  }
}

struct Prepared {
  Report report;
  std::shared_ptr<const PlannedKernel> kernel{};
};

Prepared prepare(Problem problem, Direction direction, const Device& device, const PlanOptions& options) {
  problem.direction = direction;
  validate(problem);
  const auto at_least_0 = [](const char* name, int value, const char* meaning_of_0) {
    if (value < 0) refuse(name, " (", value, ") must be at least 0, where 0 ", meaning_of_0);
  };
  check_named("device kind", device.kind, DeviceKind::kCuda);
  at_least_0("num_threads", options.num_threads, "means as many as the process may use");
  at_least_0("compute_capability", device.compute_capability, "asks the driver");
  if (device.kind == DeviceKind::kCuda) at_least_0("device index", device.index, "is the first GPU");
  dispatch::Choice choice = dispatch::choose(problem, device, options);
  Prepared prepared{.report = {.problem = problem, .device = device}};
  prepared.report.verdicts = std::move(choice.verdicts);
  if (choice.backend == nullptr) return prepared;
  prepared.report.backend = choice.backend->name();
  if (options.strict && options.backend.empty()) refuse_second_choice(prepared.report);
  prepared.kernel = choice.backend->plan(problem, device, options);
  prepared.report.details = prepared.kernel->details();
  prepared.report.workspace_bytes = prepared.kernel->workspace_bytes();
  return prepared;
}

Plan make_plan(const Problem& problem, Direction direction, const Device& device, const PlanOptions& options) {
  Prepared prepared = prepare(problem, direction, device, options);
  if (prepared.kernel == nullptr) {
    throw Error(ErrorCode::kUnsupported, "no backend runs '" + to_string(prepared.report.problem) + "' on " +
                                             name(device) + ": " + all_reasons(prepared.report.verdicts));
  }
  return {std::move(prepared.report), std::move(prepared.kernel)};
}

}  // namespace

std::string to_string(const Report& report) {
  std::string text = to_string(report.problem) + "\non " + name(report.device) + ": ";
  text += report.backend.empty() ? "nobody runs it\n" : report.backend + "\n";
  for (const auto& [key, value] : report.details) text += "  " + key + ": " + value + "\n";
  if (!report.backend.empty()) text += "  workspace: " + std::to_string(report.workspace_bytes) + " bytes\n";
  for (const Verdict& verdict : report.verdicts) {
    if (verdict.backend == report.backend) continue;
    const std::string why = verdict.reasons.empty() ? "an earlier backend runs it" : reasons_of(verdict);
    text += "not " + verdict.backend + ": " + why + "\n";
  }
  return text;
}

Plan::Plan(Report report, std::shared_ptr<const PlannedKernel> kernel)
    : report_(std::move(report)), kernel_(std::move(kernel)) {}

void Plan::execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const {
  or_out_of_memory([&] {
    if (kernel_ == nullptr) refuse("the plan has been moved from; execute the one that it was moved to");
    const auto validate_tensors = problem().direction == Direction::kBackward ? validate_backward : validate_forward;
    validate_tensors(problem(), report_.device, inputs, outputs);
    if (workspace == nullptr && workspace_bytes() > 0 && report_.device.kind != DeviceKind::kCpu)
      refuse("workspace is null; give ", workspace_bytes(), " bytes on ", name(report_.device));
    const auto owned = workspace == nullptr ? dispatch::make_workspace(report_.device, workspace_bytes()) : nullptr;
    if (owned != nullptr) workspace = owned.get();
    if (reinterpret_cast<std::uintptr_t>(workspace) % dispatch::kWorkspaceAlignment != 0)
      refuse("the workspace is not aligned to 64 bytes; allocate it so");
    kernel_->execute(inputs, outputs, workspace, stream);
  });
}

Plan plan_forward(const Problem& problem, const Device& device, const PlanOptions& options) {
  return or_out_of_memory([&] { return make_plan(problem, Direction::kForward, device, options); });
}

Plan plan_backward(const Problem& problem, const Device& device, const PlanOptions& options) {
  return or_out_of_memory([&] { return make_plan(problem, Direction::kBackward, device, options); });
}

Report explain(const Problem& problem, const Device& device, const PlanOptions& options) {
  const Direction direction = problem.direction == Direction::kBackward ? Direction::kBackward : Direction::kForward;
  return or_out_of_memory([&] { return prepare(problem, direction, device, options).report; });
}

}  // namespace fovea
