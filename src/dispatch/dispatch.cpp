#include "cpu/flash_backend.h"
#include "cpu/reference_backend.h"
#include "cuda/hopper_backend.h"
#include "cuda/portable_backend.h"
#include "dispatch/backend.h"

#include <fovea/error.h>

namespace fovea::dispatch {

std::span<const std::unique_ptr<const Backend>> backends() {
  // Every backend, best first.  A new backend is one line here.
  static const auto& list = *[] {  // kept: threads may call at exit
    auto all = std::make_unique<std::vector<std::unique_ptr<const Backend>>>();
    all->push_back(cuda::make_hopper_backend());
    all->push_back(cuda::make_portable_backend());
    for (auto& flash : cpu::make_flash_backends()) all->push_back(std::move(flash));
    all->push_back(cpu::make_reference_backend());
    return all.release();
  }();
  return list;
}

Choice choose(const Problem& problem, const Device& device, const PlanOptions& options) {
  Choice choice;
  bool known = options.backend.empty();
  for (const auto& backend : backends()) {
    Verdict verdict = backend->judge(problem, device);
    if (!options.backend.empty() && options.backend != verdict.backend) {
      verdict.reasons.push_back("the caller named backend " + options.backend);
    }
    if (options.backend.empty() && backend->only_by_name()) {
      verdict.available = false;
      verdict.reasons.push_back("it runs only where the caller names it");
    }
    known = known || options.backend == verdict.backend;
    if (verdict.reasons.empty() && choice.backend == nullptr) choice.backend = backend.get();
    choice.verdicts.push_back(std::move(verdict));
  }
  if (!known) {
    std::string names;
    for (const Verdict& verdict : choice.verdicts) names += (names.empty() ? "" : ", ") + verdict.backend;
    throw Error(ErrorCode::kInvalidArgument, "backend '" + options.backend + "' is unknown; name one of " + names);
  }
  return choice;
}

}  // namespace fovea::dispatch
