#include "cpu/flash_backend.h"
#include "cpu/reference_backend.h"
#include "cuda/driver.h"
#include "cuda/hopper_backend.h"
#include "cuda/portable_backend.h"
#include "dispatch/backend.h"
#include "problem/refuse.h"

#include <new>

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
    refuse("backend ", quote(options.backend), " is unknown; name one of ", names);
  }
  return choice;
}

std::shared_ptr<void> make_workspace(const Device& device, std::size_t bytes) {
  if (bytes == 0) return nullptr;
  if (device.kind == DeviceKind::kCuda) {
    const auto memory = std::make_shared<const cuda::DeviceMemory>(device.index, bytes);
    return {memory, memory->data()};
  }
  constexpr std::align_val_t kAlignment{kWorkspaceAlignment};
  void* const memory = ::operator new(bytes, kAlignment, std::nothrow);
  if (memory != nullptr) return {memory, [](void* owned) { ::operator delete(owned, kAlignment); }};
  throw Error(ErrorCode::kOutOfMemory, "a workspace of " + std::to_string(bytes) +
                                           " bytes could not be allocated; free memory or use fewer threads");
}

}  // namespace fovea::dispatch
