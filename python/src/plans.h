#pragma once

#include <fovea/plan.h>

#include <memory>

#include "call.h"

namespace fovea::python {

/// A plan for the call, made once and kept among the last few hundred.  From any thread, without the GIL.
[[nodiscard]] std::shared_ptr<const Plan> plan_of(const Call& call, const Rules& rules, const PlanOptions& options);

/// The plan of this thread's last call, where this one is of nothing but q, k and v and of the same shapes; else null.
[[nodiscard]] std::shared_ptr<const Plan> last_plan(const Call& call, const Rules& rules, const PlanOptions& options);

/// Workspace of a CPU plan: this thread's own, kept for its next call unless it is large.
class CpuWorkspace {
 public:
  explicit CpuWorkspace(std::size_t bytes);
  [[nodiscard]] void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  std::unique_ptr<void, Free> owned_;
  void* data_ = nullptr;
};

}  // namespace fovea::python
