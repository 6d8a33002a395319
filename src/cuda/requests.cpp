#include "cuda/requests.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda/backward_tuning.h"
#include "cuda/forward_tuning.h"
#include "cuda/hopper_backward.h"
#include "cuda/hopper_tuning.h"
#include "cuda/row_copies.h"
#include "cuda/tiles.h"

namespace fovea::cuda {
namespace {

using Requests = std::vector<jit::KernelRequest>;

constexpr int kMostMultiprocessors = 192;

/// With and without split keys, or groups of heads, where the number of multiprocessors decides which of the two a GPU
/// runs.
template <class Shape>
std::vector<Shape> shapes_of(std::optional<Shape> (&choose)(const Problem&, const GpuModel&),
                             bool (*splits)(const Shape&), const Problem& problem, int arch) {
  std::vector<Shape> shapes;
  GpuModel model = model_of(arch);
  for (model.multiprocessors = 1; model.multiprocessors <= kMostMultiprocessors; ++model.multiprocessors) {
    const auto shape = choose(problem, model);
    if (shape && std::ranges::none_of(shapes, [&](const auto& other) { return splits(other) == splits(*shape); }))
      shapes.push_back(*shape);
  }
  return shapes;
}

Requests of_forward(const ForwardShape& shape, int arch) {
  Requests all{forward_request(shape, arch)};
  if (shape.splits > 1) all.push_back(combine_request(shape.spec.type, shape.spec.dropout, shape.by_warps, arch));
  return all;
}

Requests of_backward(const Problem& problem, const BackwardShape& shape, jit::KernelRequest main, int arch) {
  Requests all{std::move(main), backward_rows_request(shape, arch)};
  if (!shape.spec.holds_dq && !shape.spec.ends_dq) all.push_back(backward_queries_request(shape, arch));
  if (shape.spec.split_gqa) all.push_back(group_sums_request(shape, arch));
  if (shape.spec.alibi || problem.sink) all.push_back(backward_sums_request(shape, arch));
  if (shape.spec.bias) all.push_back(bias_gradient_request(shape, arch));
  GpuModel model = model_of(arch);  // the more multiprocessors, the more parts
  model.multiprocessors = kMostMultiprocessors;
  if (bias_parts(problem, shape.spec, model).parts > 1) all.push_back(bias_sums_request(shape, arch));
  return all;
}

/// Of the Hopper family; none where it has no tile for the problem.
Requests of_hopper(const Problem& problem, Direction direction, const GpuModel& model) {
  Requests all;
  if (direction == Direction::kForward) {
    const auto shape = choose_forward_sm90(problem, model);
    if (!shape || has_few_rows(problem, *shape)) return {};
    all.push_back(forward_sm90_request(*shape));
    if (shape->splits > 1) all.push_back(combine_request(shape->spec.type, shape->spec.dropout, true, kSm90));
  } else {
    const auto shape = choose_backward_sm90(problem, model);
    if (!shape) return {};
    all = of_backward(problem, *shape, backward_sm90_request(*shape), kSm90);
    if (auto request = bias_gradient_sm90_request(problem, *shape)) all.push_back(*std::move(request));
  }
  if (copies_bias(problem)) all.push_back(copy_rows_request(kSm90));
  return all;
}

/// Of the portable family, on this GPU.
Requests of_portable(const Problem& problem, Direction direction, const GpuModel& model) {
  const int arch = jit::arch_of(model.sm);
  if (direction == Direction::kForward) {
    const auto shape = choose_forward(problem, model);
    return shape ? of_forward(*shape, arch) : Requests{};
  }
  const auto shape = choose_backward(problem, model);
  return shape ? of_backward(problem, *shape, backward_request(*shape, arch), arch) : Requests{};
}

}  // namespace

std::vector<jit::KernelRequest> requests(const Problem& given, Direction direction, int arch) {
  Problem problem = given;
  problem.direction = direction;
  problem = padded(problem);
  Verdict verdict;
  refuse_long(problem, verdict);
  if (!verdict.reasons.empty()) return {};  // shapes are cut in 32 bits
  Requests all;
  const auto add = [&](Requests more) { std::ranges::move(more, std::back_inserter(all)); };
  if (problem.mask) all.push_back(mask_words_request(arch));
  if (problem.head_dim != given.head_dim || problem.head_dim_v != given.head_dim_v)
    all.push_back(copy_rows_request(arch));
  if (arch == kSm90) add(of_hopper(problem, direction, model_of(arch)));
  if (direction == Direction::kForward) {
    constexpr auto kSplits = [](const ForwardShape& shape) { return shape.spec.split; };
    for (const auto& shape : shapes_of<ForwardShape>(choose_forward, kSplits, problem, arch))
      add(of_forward(shape, arch));
  } else {
    constexpr auto kSplits = [](const BackwardShape& shape) { return shape.spec.split_gqa; };
    for (const auto& shape : shapes_of<BackwardShape>(choose_backward, kSplits, problem, arch))
      add(of_backward(problem, shape, backward_request(shape, arch), arch));
  }
  return all;
}

std::vector<OfferedTile> tiles_on_offer(const Problem& given, const std::string& backend, const GpuModel& gpu) {
  const Problem problem = padded(given);
  const auto kernels = [&](const GpuModel& model) {
    return backend == kHopperName ? of_hopper(problem, problem.direction, model)
                                  : of_portable(problem, problem.direction, model);
  };
  std::vector<std::string> names;
  GpuModel model = gpu;
  model.choices = nullptr, model.names = &names;
  (void)kernels(model);
  model.names = nullptr;
  std::vector<OfferedTile> offered;
  for (const std::string& name : names) {
    TileChoices choice{{}};
    choice.set(kind_of(backend, problem), name);
    model.choices = &choice;
    offered.push_back({name, kernels(model)});
  }
  return offered;
}

}  // namespace fovea::cuda
