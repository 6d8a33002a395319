#include "cuda/hopper_backend.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <limits>

#include "cuda/driver.h"
#include "cuda/hopper_backward.h"
#include "cuda/hopper_tuning.h"
#include "cuda/params_sm90.h"
#include "cuda/row_copies.h"
#include "cuda/tensor_map.h"
#include "dispatch/views.h"

namespace fovea::cuda {
namespace {

constexpr std::int64_t kMostTiles = std::int64_t{1} << 23;  // the kernel counts them in 24 bits
constexpr std::size_t kTicketBytes = 64;
constexpr float kLeastScale = 1e-4F;  // slopes are divided by the scale
constexpr int kManyTiles = 8;         // tiles per multiprocessor from which on the starts of blocks are staggered
constexpr int kClocksApart = 4096;    // from the first block's start to the last one's; measured (docs/notes)

class ForwardSm90Plan final : public PlannedKernel {
 public:
  ForwardSm90Plan(const Problem& problem, const ForwardSm90Shape& shape, const Device& device)
      : shape_(shape),
        packed_(problem.packed()),
        device_(device),
        multiprocessors_(model_of_device(device).multiprocessors),
        mask_words_(problem, kTicketBytes + shape.partial_bytes, device, kSm90, WordOrder::kLanes),
        aligned_bias_(problem, mask_words_.workspace_bytes(), device),
        forward_(forward_sm90_request(shape), device),
        combining_(shape.splits, shape.spec.type, shape.spec.dropout, true, device, kSm90) {
    describe_call(problem, params_);
    params_.row_blocks = static_cast<int>(shape.row_blocks);
    params_.tiles = static_cast<int>(shape.tiles);
    params_.heads_abreast = static_cast<int>(shape.heads_abreast);
    params_.batch_inside = shape.batch_inside;
    params_.splits = static_cast<int>(shape.splits);
    params_.packed_heads = static_cast<int>(shape.packed_heads);
    params_.packed_bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(shape.packed_heads - 1)));
    params_.heads = static_cast<int>(problem.num_q_heads / shape.packed_heads);
  }

  [[nodiscard]] std::size_t workspace_bytes() const override { return aligned_bias_.workspace_bytes(); }

  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override {
    const ForwardSm90Spec& s = shape_.spec;
    std::vector<std::pair<std::string, std::string>> list{
        {"kernel", forward_.describe()},
        {"tile", describe_tile(shape_)},
        {"registers", std::to_string(s.warpgroups) + " warpgroups of " + std::to_string(consumer_registers(s)) +
                          " and one of " + std::to_string(producer_registers(s))},
        {"order", (packed_ ? "at most " : "") + std::to_string(shape_.tiles) + " tiles, " +
                      std::to_string(shape_.heads_abreast) + (shape_.heads_abreast == 1 ? " head" : " heads") +
                      " in turns"}};
    if (shape_.spec.pack_gqa) list.emplace_back("packed heads", std::to_string(shape_.packed_heads));
    combining_.describe(list);
    aligned_bias_.describe(list);
    return list;
  }

  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* stream) const override {
    require_gpu(forward_, device_);
    if (shape_.tiles == 0) return;
    ForwardSm90Params params = params_;
    attach_inputs(params, inputs);
    params.out = dispatch::row_view(outputs.out);
    params.lse = dispatch::stat_view(outputs.lse);
    aligned_bias_.make(params, workspace, stream);
    make_maps(params);
    params.ticket = static_cast<u64*>(workspace);
    params.partials = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + kTicketBytes);
    mask_words_.make(params, workspace, stream);
    if (shape_.spec.blocks == 1 && shape_.tiles >= kManyTiles * multiprocessors_)
      params.clocks_apart = kClocksApart / multiprocessors_;
    launch(forward_,
           static_cast<int>(std::min<std::int64_t>(shape_.tiles, std::int64_t{multiprocessors_} * shape_.spec.blocks)),
           params, stream);
    ForwardParams parts{};
    static_cast<CallParams&>(parts) = static_cast<const CallParams&>(params);
    parts.out = params.out, parts.lse = params.lse;
    parts.v_chunks = 1, parts.v_columns = params.head_dim_v;
    parts.splits = params.splits, parts.partials = params.partials;
    combining_.run(parts, stream);
  }

 private:
  void make_maps(ForwardSm90Params& p) const {
    const auto& s = shape_.spec;
    const CallMaps maps{p, CurrentGpu(device_.index), s.type, q_rows(s), s.block_n};
    const auto of_rows = [&](const RowView& view, int columns, int rows, TensorMap& map) {
      return s.pack_gqa ? maps.of_packed_rows(view, columns, rows, p.packed_heads, p.packed_bits, map)
                        : maps.of_rows(view, columns, rows, map);
    };
    p.by_engine = of_rows(p.q, p.head_dim, q_rows(s), p.q_map) && maps.of_keys(p.k, p.head_dim, p.k_map) &&
                  maps.of_keys(p.v, p.head_dim_v, p.v_map);
    p.out_by_engine = leaves_through_q(s) && of_rows(p.out, p.head_dim_v, kWarpRows, p.out_map);
    p.bias_by_engine = s.bias && maps.of_entries(p.bias, s.bias_type, kGroupRows, p.bias_map);
  }

  ForwardSm90Shape shape_;
  bool packed_;  // then sequences may have fewer tiles
  Device device_;
  int multiprocessors_;
  MaskWords mask_words_;
  AlignedBias aligned_bias_;
  PlannedLaunch forward_;
  Combining combining_;
  ForwardSm90Params params_{};
};

class HopperBackend final : public Backend {
 public:
  [[nodiscard]] std::string name() const override { return kHopperName; }

  [[nodiscard]] Verdict judge(const Problem& given, const Device& device) const override {
    Verdict verdict{.backend = name()};
    auto& reasons = verdict.reasons;
    const auto runs_on = [](int capability) { return capability == kSm90; };
    refuse_device(device, runs_on, "compute capability 9.0 (Hopper)", verdict);
    if (!verdict.available) return verdict;

    const Problem problem = padded(given);
    refuse_long(problem, verdict);
    if (problem.dtype == DType::kFloat32) reasons.emplace_back("it multiplies fp16 and bf16, not fp32");
    const auto refuse_dim = [&](const char* what, std::int64_t dim) {
      limit(verdict, what, dim, 256);
      if (dim % 8 == 0) return;
      reasons.emplace_back(std::string(what) + " (" + std::to_string(dim) + ") is no multiple of 8");
    };
    refuse_dim("head_dim", problem.head_dim);
    refuse_dim("head_dim_v", problem.head_dim_v);
    const bool backward = problem.direction == Direction::kBackward;
    if (!reasons.empty()) return verdict;
    const GpuModel model = model_of_device(device);
    const auto found = [&](const auto& shape) {
      if (!shape) {
        reasons.emplace_back("no tile of head_dim " + std::to_string(problem.head_dim) + " and head_dim_v " +
                             std::to_string(problem.head_dim_v) + " fits with these options");
      }
      return shape.has_value();
    };
    if (backward) {
      const auto shape = choose_backward_sm90(problem, model);
      if (found(shape)) limit(verdict, "the number of blocks", shape->most_blocks, std::numeric_limits<int>::max());
    } else if (const auto shape = choose_forward_sm90(problem, model); found(shape)) {
      limit(verdict, "the number of tiles", shape->tiles, kMostTiles);
      if (has_few_rows(problem, *shape)) {
        reasons.emplace_back("seqlen_q (" + std::to_string(problem.seqlen_q) +
                             ") is short, and the portable kernels are faster with so few rows");
      }
      if (begins_with_slopes(shape->spec) && problem.scale() < kLeastScale) {
        std::array<char, 32> digits{};
        const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), problem.scale()).ptr;
        reasons.emplace_back("softmax_scale (" + std::string(digits.data(), end) +
                             ") is below 0.0001, and slopes are divided by it");
      }
    }
    return verdict;
  }

  [[nodiscard]] std::shared_ptr<const PlannedKernel> plan(const Problem& given, const Device& device,
                                                          const PlanOptions& /*options*/) const override {
    const Problem problem = padded(given);
    if (problem.direction == Direction::kBackward)
      return plan_by_padded(given, plan_backward_sm90(problem, device), device, kSm90);
    const auto shape = choose_forward_sm90(problem, model_of_device(device));
    return plan_by_padded(given, std::make_shared<ForwardSm90Plan>(problem, *shape, device), device, kSm90);
  }
};

}  // namespace

std::unique_ptr<Backend> make_hopper_backend() { return std::make_unique<HopperBackend>(); }

}  // namespace fovea::cuda
