#include "cuda/portable_backend.h"

#include <algorithm>
#include <limits>

#include "cuda/backward_tuning.h"
#include "cuda/forward_tuning.h"
#include "cuda/planned_backward.h"
#include "cuda/row_copies.h"
#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

using dispatch::row_view, dispatch::stat_view;

class ForwardPlan final : public PlannedKernel {
 public:
  ForwardPlan(const Problem& problem, const ForwardShape& shape, const Device& device, int arch)
      : shape_(shape),
        device_(device),
        mask_words_(problem, shape.partial_bytes, device, arch),
        forward_(forward_request(shape, arch), device),
        combining_(shape.splits, shape.spec.type, shape.spec.dropout, shape.by_warps, device, arch) {
    describe_call(problem, params_);
    params_.row_blocks = shape.row_blocks;
    params_.heads_abreast = static_cast<int>(shape.heads_abreast);
    params_.v_chunks = shape.v_chunks;
    params_.v_columns = shape.spec.head_dim_v;
    params_.splits = shape.splits;
    params_.keys_per_split = shape.keys_per_split;
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return mask_words_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    std::vector<std::pair<std::string, std::string>> list{{"kernel", forward_.describe()},
                                                          {"tile", describe_tile(shape_)}};
    combining_.describe(list);
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(forward_, device_);
    ForwardParams params = params_;
    attach_inputs(params, inputs);
    params.out = row_view(outputs.out);
    params.lse = stat_view(outputs.lse);
    params.partials = static_cast<float*>(workspace);
    if (shape_.most_blocks == 0) return;
    mask_words_.make(params, workspace, stream);
    launch(forward_, static_cast<int>(shape_.most_blocks), params, stream, shape_.spec.slices);
    combining_.run(params, stream);
  }

 private:
  ForwardShape shape_;
  Device device_;
  MaskWords mask_words_;
  PlannedLaunch forward_;
  Combining combining_;
  ForwardParams params_{};
};

class BackwardPlan final : public PlannedKernel {
 public:
  BackwardPlan(const Problem& problem, const BackwardShape& shape, const Device& device, int arch)
      : device_(device), call_(problem, shape, device, arch), main_(backward_request(shape, arch), device) {}

  [[nodiscard]] std::size_t workspace_bytes() const override { return call_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    std::vector<std::pair<std::string, std::string>> list{{"kernel", main_.describe()},
                                                          {"tile", describe_tile(call_.shape())}};
    std::ranges::copy(call_.details(), std::back_inserter(list));
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(main_, device_);
    BackwardParams p = call_.params(inputs, outputs, workspace);
    call_.before(p, workspace, stream);
    launch(main_, call_.main_blocks(p), p, stream);
    call_.add_parts(p, stream);
    call_.after(p, outputs, workspace, stream);
  }

 private:
  Device device_;
  BackwardCall call_;
  PlannedLaunch main_;
};

class PortableBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return kPortableName; }

  [[nodiscard]] Verdict judge(const Problem& given, const Device& device) const override {
    Verdict verdict{.backend = name()};
    const auto runs_on = [](int capability) { return jit::arch_of(capability) != 0; };
    refuse_device(device, runs_on, "compute capabilities 7.5 (Turing) to 12.x (Blackwell)", verdict);
    if (!verdict.available) return verdict;

    const Problem problem = padded(given);
    refuse_long(problem, verdict);
    if (!verdict.reasons.empty()) return verdict;
    const GpuModel model = model_of_device(device);
    const auto judge_shape = [&](const auto& shape) {
      if (shape) return limit(verdict, "the number of blocks", shape->most_blocks, std::numeric_limits<int>::max());
      verdict.reasons.emplace_back("no tile of head_dim " + std::to_string(problem.head_dim) + " fits the " +
                                   std::to_string(model.shared_bytes / 1024) + " KiB of shared memory");
    };
    if (problem.direction == Direction::kBackward) {
      judge_shape(choose_backward(problem, model));
    } else {
      judge_shape(choose_forward(problem, model));
    }
    return verdict;
  }

  [[nodiscard]] std::shared_ptr<const PlannedKernel> plan(const Problem& given, const Device& device,
                                                          const PlanOptions& /*options*/) const override {
    const GpuModel model = model_of_device(device);
    const int arch = jit::arch_of(model.sm);
    const Problem problem = padded(given);
    std::shared_ptr<const PlannedKernel> plan;
    if (problem.direction == Direction::kBackward) {
      plan = std::make_shared<BackwardPlan>(problem, *choose_backward(problem, model), device, arch);
    } else {
      plan = std::make_shared<ForwardPlan>(problem, *choose_forward(problem, model), device, arch);
    }
    return plan_by_padded(given, std::move(plan), device, arch);
  }
};

}  // namespace

std::unique_ptr<Backend> make_portable_backend() { return std::make_unique<PortableBackend>(); }

}  // namespace fovea::cuda
