#pragma once

#include <fovea/plan.h>

#include <memory>
#include <span>
#include <string>
#include <vector>

namespace fovea {

/// A problem that a backend has planned; immutable, so that any number of threads may execute it at once.
class PlannedKernel {
 public:
  virtual ~PlannedKernel() = default;
  [[nodiscard]] virtual std::size_t workspace_bytes() const = 0;
  [[nodiscard]] virtual std::vector<std::pair<std::string, std::string>> details() const = 0;

  /// The tensors have been checked against the problem; `workspace` is there and aligned to 64 bytes.
  virtual void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const = 0;
};

/// One way to run problems on one kind of device.
class Backend {
 public:
  virtual ~Backend() = default;
  [[nodiscard]] virtual std::string name() const = 0;

  /// True for a backend too slow to be chosen unless the caller names it.
  [[nodiscard]] virtual bool only_by_name() const { return false; }

  /// Whether it runs this problem on this device, and if not, every reason why.
  [[nodiscard]] virtual Verdict judge(const Problem& problem, const Device& device) const = 0;

  /// Only for a problem that `judge` accepted; its direction is kForward or kBackward.
  [[nodiscard]] virtual std::shared_ptr<const PlannedKernel> plan(const Problem& problem, const Device& device,
                                                                  const PlanOptions& options) const = 0;
};

}  // namespace fovea

namespace fovea::dispatch {

/// Every backend there is, in order of preference.
[[nodiscard]] std::span<const std::unique_ptr<const Backend>> backends();

struct Choice {
  const Backend* backend = nullptr;  ///< null: nobody
  std::vector<Verdict> verdicts;
};

/// The first backend that says yes, and what all of them said.
[[nodiscard]] Choice choose(const Problem& problem, const Device& device, const PlanOptions& options);

inline constexpr std::size_t kWorkspaceAlignment = 64;
/// Memory on a device for a plan's workspace; null for 0 bytes.
[[nodiscard]] std::shared_ptr<void> make_workspace(const Device& device, std::size_t bytes);

}  // namespace fovea::dispatch
