#include "cuda/portable_backend.h"

#include <fovea/error.h>

#include <algorithm>
#include <limits>

#include "cuda/backward_plan.h"
#include "cuda/backward_tuning.h"
#include "cuda/driver.h"
#include "cuda/forward_tuning.h"
#include "cuda/jit/cache.h"
#include "cuda/params.h"
#include "cuda/requests.h"
#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

using dispatch::entry_view, dispatch::row_view, dispatch::head_view, dispatch::stat_view;

constexpr std::int64_t kLongest = std::int64_t{1} << 29;  // positions are 32 bits wide in kernels
constexpr std::int64_t kMostInGrid = 65535;

/// Whether a bias's entries 8n to 8n + 7 along the keys are neighbours that one load can take, or one of 16 bytes some
/// of them.
bool in_runs(const Tensor& t) {
  if (!t.defined()) return true;
  const std::int64_t size = size_bytes(t.dtype), run = std::min<std::int64_t>(8 * size, 16);
  bool runs = t.shape[3] > 1 && t.strides[3] == 1 && reinterpret_cast<std::uintptr_t>(t.data) % run == 0;
  for (int axis = 0; axis < 3; ++axis) runs = runs && (t.shape[axis] == 1 || t.strides[axis] * size % run == 0);
  return runs;
}

IndexView index_view(const Tensor& t) {
  if (!t.defined()) return {};
  return {static_cast<const int*>(t.data), t.strides[0]};
}

/// What does not depend on tensors.
void describe_call(const Problem& problem, CallParams& p) {
  p.batch = static_cast<int>(problem.batch);
  p.q_heads = static_cast<int>(problem.num_q_heads);
  p.kv_heads = static_cast<int>(problem.num_kv_heads);
  p.group = p.q_heads / p.kv_heads;
  p.head_dim = static_cast<int>(problem.head_dim);
  p.head_dim_v = static_cast<int>(problem.head_dim_v);
  p.seqlen_q = static_cast<int>(problem.seqlen_q);
  p.seqlen_kv = static_cast<int>(problem.seqlen_kv);
  p.total_q = static_cast<int>(problem.total_q);
  p.total_kv = static_cast<int>(problem.total_kv);
  p.band = math::BandRule::of(problem);
  p.scale = problem.scale();
  p.softcap = problem.softcap;
  p.keep_threshold = dispatch::keep_threshold(problem.dropout.probability);
  p.keep_scale = 65536.0F / static_cast<float>(p.keep_threshold);
  p.seed = problem.dropout.seed;
  p.offset = problem.dropout.offset;
}

void attach_inputs(CallParams& p, const Inputs& in) {
  p.q_lengths = index_view(in.q_lengths);
  p.kv_lengths = index_view(in.kv_lengths);
  p.cu_seqlens_q = index_view(in.cu_seqlens_q);
  p.cu_seqlens_kv = index_view(in.cu_seqlens_kv);
  p.q = row_view(in.q);
  p.k = row_view(in.k);
  p.v = row_view(in.v);
  const auto in_pieces = [](const RowView& view, int dim, const Tensor& t) {
    return view.aligned && dim * size_bytes(t.dtype) % 16 == 0 && view.row >= 0 && view.row < (std::int64_t{1} << 32);
  };
  p.in_pieces = in_pieces(p.k, p.head_dim, in.k) && in_pieces(p.v, p.head_dim_v, in.v);
  p.mask = entry_view(in.mask);
  p.bias = entry_view(in.bias);
  p.bias_in_runs = in_runs(in.bias);
  p.slopes = head_view(in.alibi_slopes);
  p.sink = head_view(in.sink).data;
}

/// A kernel of a plan: loaded where there is a GPU, else only known.
struct PlannedLaunch {
  jit::KernelRequest request;
  std::shared_ptr<const jit::Binary> binary{};
  const jit::Kernel* kernel = nullptr;
  std::string why_not_compiled{};

  PlannedLaunch(jit::KernelRequest wanted, const Device& device) : request(std::move(wanted)) {
    if (device.compute_capability != 0) {  // a description: what cannot be compiled here is told, too
      try {
        binary = jit::Cache::shared().binary(request);
      } catch (const Error& error) {
        why_not_compiled = error.what();
      }
    } else {
      kernel = &jit::Cache::shared().load(request, device.index);
    }
  }
  [[nodiscard]] std::string describe() const {
    if (!why_not_compiled.empty()) return request.name + ": not compiled, " + why_not_compiled;
    const jit::Binary& compiled = kernel != nullptr ? kernel->binary() : *binary;
    return request.name + ": " + std::to_string(compiled.registers) + " registers, " +
           std::to_string(request.shared_bytes + compiled.shared_bytes) + " bytes of shared memory, " +
           std::to_string(request.threads) + " threads, from " + jit::name(compiled.source);
  }
};

/// Of a mask of these own dimensions.
WordView word_view(const CallParams& p, bool batch, bool heads, bool queries) {
  WordView view{};
  view.rows = queries ? p.seqlen_q : 1;
  view.count = (p.seqlen_kv + 31) / 32;
  view.heads = heads ? p.q_heads : 1;
  view.planes = batch ? view.heads * p.batch : view.heads;
  view.row = queries ? 1 : 0;
  view.head = heads ? view.plane() : 0;
  view.batch = batch ? view.plane() * view.heads : 0;
  return view;
}

/// The words that a boolean mask becomes before a pass, at the end of its workspace.
class MaskWords {
 public:
  MaskWords(const Problem& problem, std::size_t workspace_bytes, const Device& device, int arch)
      : begin_((workspace_bytes + 127) / 128 * 128), bytes_(workspace_bytes) {
    if (!problem.mask) return;
    launch_.emplace(mask_words_request(arch), device);
    CallParams p{};
    describe_call(problem, p);
    const WordView view = word_view(p, problem.mask->batch, problem.mask->heads, problem.mask->queries);
    bytes_ = begin_ + static_cast<std::size_t>(view.plane() * view.planes) * sizeof(u32);
  }

  /// Of the workspace, with what comes before.
  [[nodiscard]] std::size_t workspace_bytes() const { return bytes_; }

  void make(CallParams& p, void* workspace, void* stream) const {
    if (!launch_) return;
    WordView& view = p.mask_words;  // what is expanded by a stride of 0 is read once
    view = word_view(p, p.mask.batch != 0, p.mask.head != 0, p.mask.query != 0);
    view.data = reinterpret_cast<u32*>(static_cast<std::byte*>(workspace) + begin_);
    if (view.plane() == 0) return;
    launch_->kernel->launch({.x = static_cast<unsigned>(view.spans() * view.groups()),
                             .y = static_cast<unsigned>(std::min<std::int64_t>(view.planes, kMostInGrid)),
                             .z = 1,
                             .threads = static_cast<unsigned>(launch_->request.threads),
                             .shared_bytes = 0},
                            p, stream);
  }

 private:
  std::size_t begin_, bytes_;
  std::optional<PlannedLaunch> launch_;
};

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
    if (forward_.kernel == nullptr) {
      throw Error(ErrorCode::kInvalidArgument,
                  "this plan is for " + name(device_) + ", a description; plan for cuda:0 to execute");
    }
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
    if (main_.kernel == nullptr) {
      throw Error(ErrorCode::kInvalidArgument,
                  "this plan is for " + name(device_) + ", a description; plan for cuda:0 to execute");
    }
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

int capability_of(const Device& device) {
  return device.compute_capability != 0 ? device.compute_capability : gpu(device.index).compute_capability;
}

GpuModel model_of_device(const Device& device) {
  GpuModel model = model_of(capability_of(device));
  if (device.compute_capability == 0) {
    model.multiprocessors = gpu(device.index).sm_count;
    model.shared_bytes = gpu(device.index).shared_bytes_per_block;
  }
  return model;
}

class PortableBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return "cuda_portable"; }

  [[nodiscard]] Verdict judge(const Problem& problem, const Device& device) const override {
    Verdict verdict{.backend = name()};
    auto& reasons = verdict.reasons;
    if (device.kind != DeviceKind::kCuda) {
      reasons.emplace_back("it runs on NVIDIA GPUs only, and the tensors are on " + fovea::name(device));
    } else if (device.compute_capability == 0 && !why_no_driver().empty()) {
      reasons.push_back(why_no_driver());
    } else if (capability_of(device) < 75) {
      reasons.emplace_back("it needs compute capability 7.5 (Turing) or newer, and " + fovea::name(device) + " has " +
                           std::to_string(capability_of(device) / 10) + "." +
                           std::to_string(capability_of(device) % 10));
    }
    verdict.available = reasons.empty();
    if (!verdict.available) return verdict;

    const auto limit = [&](const char* what, std::int64_t value, std::int64_t most) {
      if (value > most) {
        reasons.emplace_back(std::string(what) + " (" + std::to_string(value) + ") is above " + std::to_string(most));
      }
    };
    limit("seqlen_q", problem.seqlen_q, kLongest);
    limit("seqlen_kv", problem.seqlen_kv, kLongest);
    limit("total_q", problem.total_q, kLongest);
    limit("total_kv", problem.total_kv, kLongest);
    limit("num_q_heads", problem.num_q_heads, kMostInGrid);
    limit("batch", problem.batch, kLongest);
    if (!reasons.empty()) return verdict;
    const GpuModel model = model_of_device(device);
    bool fits;
    if (problem.direction == Direction::kBackward) {
      const auto shape = choose_backward(problem, model);
      fits = shape.has_value();
      if (fits) limit("the number of blocks", shape->most_blocks, std::numeric_limits<int>::max());
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
