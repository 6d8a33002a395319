#include "cpu/reference_backend.h"

#include <fovea/error.h>

#include <new>

#include "cpu/elements.h"
#include "cpu/reference.h"

namespace fovea::cpu {
namespace {

class ReferenceKernel final : public PlannedKernel {
 public:
  explicit ReferenceKernel(Problem problem) : problem_(std::move(problem)) {}

  [[nodiscard]] std::size_t workspace_bytes() const override { return 0; }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    return {{"method", "the formula itself, O(N²), in double precision: the oracle of the tests"}, {"threads", "1"}};
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* /*workspace*/, void* /*stream*/) const override {
    try {
      const Results result = reference(problem_, inputs);
      if (problem_.forward()) {
        store_all(outputs.out, result.out);
        store_all(outputs.lse, result.lse);
        return;
      }
      store_all(outputs.dq, result.dq);
      store_all(outputs.dk, result.dk);
      store_all(outputs.dv, result.dv);
      store_all(outputs.dbias, result.dbias);
      store_all(outputs.dalibi_slopes, result.dalibi_slopes);
      store_all(outputs.dsink, result.dsink);
    } catch (const std::bad_alloc&) {
      throw Error(
          ErrorCode::kOutOfMemory,
          "the double-precision copies that backend reference makes could not be allocated; use a smaller problem");
    }
  }

 private:
  Problem problem_;
};

class ReferenceBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return "reference"; }

  [[nodiscard]] bool only_by_name() const override { return true; }

  [[nodiscard]] Verdict judge(const Problem& /*problem*/, const Device& device) const override {
    if (device.kind == DeviceKind::kCpu) return {name(), true, {}};
    return {name(), false, {"it runs on the CPU only"}};
  }

  [[nodiscard]] std::shared_ptr<const PlannedKernel> plan(const Problem& problem, const Device& /*device*/,
                                                          const PlanOptions& /*options*/) const override {
    return std::make_shared<ReferenceKernel>(problem);
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace fovea::cpu
