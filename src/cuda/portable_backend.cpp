#include "cuda/portable_backend.h"

#include <fovea/error.h>

#include <algorithm>
#include <limits>

#include "cuda/backward_plan.h"
#include "cuda/backward_tuning.h"
#include "cuda/forward_tuning.h"
#include "cuda/hopper_tuning.h"
#include "cuda/planned_call.h"
#include "cuda/requests.h"
#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

using dispatch::entry_view, dispatch::row_view, dispatch::head_view, dispatch::stat_view;

class ForwardPlan final : public PlannedKernel {
 public:
  ForwardPlan(const Problem& problem, const ForwardShape& shape, const Device& device, int arch)
      : shape_(shape),
        device_(device),
        mask_words_(problem, shape.partial_bytes, device, arch),
        forward_(forward_request(shape, arch), device) {
    if (shape.splits > 1) combine_.emplace(combine_request(shape, arch), device);
    describe_call(problem, params_);
    params_.row_blocks = shape.row_blocks;
    params_.v_chunks = shape.v_chunks;
    params_.splits = shape.splits;
    params_.keys_per_split = shape.keys_per_split;
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return mask_words_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    const ForwardSpec& s = shape_.spec;
    std::vector<std::pair<std::string, std::string>> list{
        {"kernel", forward_.describe()},
        {"tile", std::to_string(s.block_m) + " rows × " + std::to_string(s.block_n) + " keys, " +
                     std::to_string(s.stages) + (s.stages == 1 ? " stage" : " stages")},
        {"key splits", std::to_string(shape_.splits)}};
    if (combine_) list.emplace_back("combine", combine_->describe());
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(forward_, device_);
    ForwardParams params = params_;
    attach_inputs(params, inputs);
    params.out = row_view(outputs.out);
    params.lse = stat_view(outputs.lse);
    params.partials = static_cast<float*>(workspace);
    if (params.seqlen_q == 0) return;
    mask_words_.make(params, workspace, stream);
    const int heads = shape_.spec.pack_gqa ? params.kv_heads : params.q_heads;
    for (params.first_batch = 0; params.first_batch < params.batch;
         params.first_batch += static_cast<int>(kMostInGrid)) {
      Grid grid{.x = static_cast<unsigned>(shape_.row_blocks * shape_.v_chunks * shape_.splits),
                .y = static_cast<unsigned>(heads),
                .z = static_cast<unsigned>(std::min<std::int64_t>(params.batch - params.first_batch, kMostInGrid)),
                .threads = static_cast<unsigned>(forward_.request.threads),
                .shared_bytes = static_cast<unsigned>(forward_.request.shared_bytes)};
      forward_.kernel->launch(grid, params, stream);
      if (!combine_) continue;
      grid.x = static_cast<unsigned>((params.seqlen_q + kCombineRows - 1) / kCombineRows);
      grid.y = static_cast<unsigned>(params.q_heads);
      grid.threads = static_cast<unsigned>(combine_->request.threads);
      grid.shared_bytes = 0;
      combine_->kernel->launch(grid, params, stream);
    }
  }

 private:
  ForwardShape shape_;
  Device device_;
  MaskWords mask_words_;
  PlannedLaunch forward_;
  std::optional<PlannedLaunch> combine_;
  ForwardParams params_{};
};

class BackwardPlan final : public PlannedKernel {
 public:
  BackwardPlan(const Problem& problem, const BackwardShape& shape, const Device& device, int arch)
      : shape_(shape),
        device_(device),
        mask_words_(problem, shape.workspace_bytes, device, arch),
        rows_(backward_rows_request(shape, arch), device),
        main_(backward_request(shape, arch), device),
        queries_(backward_queries_request(shape, arch), device) {
    if (shape.spec.alibi || problem.sink) sums_.emplace(backward_sums_request(shape, arch), device);
    if (shape.spec.bias) bias_.emplace(bias_gradient_request(shape, arch), device);
    describe_call(problem, params_);
    params_.row_blocks = shape.row_blocks;
    params_.key_blocks = shape.key_blocks;
    params_.row_slots = shape.row_slots;
    params_.heads_abreast = shape.heads_abreast;
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return mask_words_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    const BackwardSpec& s = shape_.spec;
    return {{"kernel", main_.describe()},
            {"tile", std::to_string(s.block_m) + " rows × " + std::to_string(s.block_n) + " keys, " +
                         std::to_string(s.stages) + (s.stages == 1 ? " stage" : " stages")},
            {"rows", rows_.describe()},
            {"queries", queries_.describe()}};
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(main_, device_);
    BackwardParams p = params_;
    attach_inputs(p, inputs);
    p.out = row_view(inputs.out);
    p.dout = row_view(inputs.dout);
    p.lse = stat_view(inputs.lse);
    p.dlse = stat_view(inputs.dlse);
    p.dq = row_view(outputs.dq);
    p.dk = row_view(outputs.dk);
    p.dv = row_view(outputs.dv);
    p.dbias = entry_view(outputs.dbias);
    p.dslopes = head_view(outputs.dalibi_slopes);
    p.dsink = head_view(outputs.dsink).data;
    auto* memory = static_cast<std::byte*>(workspace);
    p.log2_lse = reinterpret_cast<float*>(memory + shape_.log2_lse);
    p.delta = reinterpret_cast<float*>(memory + shape_.delta);
    p.dq_sum = reinterpret_cast<float*>(memory + shape_.dq_sum);
    p.tickets = reinterpret_cast<int*>(memory + shape_.tickets);
    p.sink_parts = reinterpret_cast<float*>(memory + shape_.sink_parts);
    p.slope_parts = reinterpret_cast<float*>(memory + shape_.slope_parts);

    mask_words_.make(p, workspace, stream);
    const int row_tiles = p.row_blocks * p.q_heads * p.batch;
    launch(rows_, row_tiles, p, stream);
    launch(main_, p.key_blocks * p.kv_heads * p.batch, p, stream);
    launch(queries_, row_tiles, p, stream);
    if (p.dslopes.data != nullptr || p.dsink != nullptr) {
      launch(*sums_, p.q_heads * (p.slopes.per_batch ? p.batch : 1), p, stream);
    }
    if (p.dbias.data != nullptr) {
      const Tensor& t = outputs.dbias;
      p.key_blocks = (p.seqlen_kv + bias_gradient_keys(shape_.spec) - 1) / bias_gradient_keys(shape_.spec);
      const auto count = [](std::int64_t size, int many) { return size == 1 ? 1 : many; };
      launch(*bias_,
             count(t.shape[0], p.batch) * count(t.shape[1], p.q_heads) * count(t.shape[2], p.row_blocks) *
                 count(t.shape[3], p.key_blocks),
             p, stream);
    }
  }

 private:
  static void launch(const PlannedLaunch& what, int blocks, const BackwardParams& params, void* stream) {
    if (blocks == 0) return;
    what.kernel->launch({.x = static_cast<unsigned>(blocks),
                         .y = 1,
                         .z = 1,
                         .threads = static_cast<unsigned>(what.request.threads),
                         .shared_bytes = static_cast<unsigned>(what.request.shared_bytes)},
                        params, stream);
  }

  BackwardShape shape_;
  Device device_;
  MaskWords mask_words_;
  PlannedLaunch rows_, main_, queries_;
  std::optional<PlannedLaunch> sums_, bias_;
  BackwardParams params_{};
};

class PortableBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return "cuda_portable"; }

  [[nodiscard]] Verdict judge(const Problem& problem, const Device& device) const override {
    Verdict verdict{.backend = name()};
    auto& reasons = verdict.reasons;
    refuse_device(device, verdict);
    if (reasons.empty() && capability_of(device) < 75) {
      reasons.emplace_back("it needs compute capability 7.5 (Turing) or newer, and " + fovea::name(device) + " has " +
                           std::to_string(capability_of(device) / 10) + "." +
                           std::to_string(capability_of(device) % 10));
    }
    verdict.available = reasons.empty();
    if (!verdict.available) return verdict;

    refuse_long(problem, verdict);
    limit(verdict, "num_q_heads", problem.num_q_heads, kMostInGrid);
    if (!reasons.empty()) return verdict;
    const GpuModel model = model_of_device(device);
    bool fits;
    if (problem.direction == Direction::kBackward) {
      const auto shape = choose_backward(problem, model);
      fits = shape.has_value();
      if (fits) limit(verdict, "the number of blocks", shape->most_blocks, std::numeric_limits<int>::max());
    } else {
      fits = choose_forward(problem, model).has_value();
    }
    if (!fits) {
      reasons.emplace_back("no tile of head_dim " + std::to_string(problem.head_dim) + " fits the " +
                           std::to_string(model.shared_bytes / 1024) + " KiB of shared memory");
    }
    return verdict;
  }

  [[nodiscard]] std::shared_ptr<const PlannedKernel> plan(const Problem& problem, const Device& device,
                                                          const PlanOptions& /*options*/) const override {
    if (problem.direction == Direction::kBackward) {
      return std::make_shared<BackwardPlan>(problem, *choose_backward(problem, model_of_device(device)), device,
                                            jit::arch_of(capability_of(device)));
    }
    return std::make_shared<ForwardPlan>(problem, *choose_forward(problem, model_of_device(device)), device,
                                         jit::arch_of(capability_of(device)));
  }
};

}  // namespace

std::vector<jit::KernelRequest> requests(const Problem& problem, Direction direction, int arch) {
  std::vector<jit::KernelRequest> all;
  if (problem.mask) all.push_back(mask_words_request(arch));
  if (direction == Direction::kForward) {
    constexpr int kHopper = 90;
    const auto hopper = arch == kHopper && !has_few_rows(problem) ? choose_forward_sm90(problem) : std::nullopt;
    if (hopper) all.push_back(forward_sm90_request(*hopper));
    if (const auto shape = choose_forward(problem, model_of(arch))) {
      all.push_back(forward_request(*shape, arch));
      if (shape->splits > 1) all.push_back(combine_request(*shape, arch));
    }
  }
  if (direction == Direction::kBackward) {
    if (const auto shape = choose_backward(problem, model_of(arch))) {
      all.push_back(backward_rows_request(*shape, arch));
      all.push_back(backward_request(*shape, arch));
      all.push_back(backward_queries_request(*shape, arch));
      if (shape->spec.alibi || problem.sink) all.push_back(backward_sums_request(*shape, arch));
      if (shape->spec.bias) all.push_back(bias_gradient_request(*shape, arch));
    }
  }
  return all;
}

std::unique_ptr<Backend> make_portable_backend() { return std::make_unique<PortableBackend>(); }

}  // namespace fovea::cuda
