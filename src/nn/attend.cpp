#include <algorithm>
#include <list>
#include <mutex>
#include <tuple>

#include "cpu/elements.h"
#include "cpu/threads.h"
#include "nn/ops.h"
#include "problem/operands.h"

namespace fovea::nn {
namespace {

constexpr std::size_t kMostPlans = 64;

struct Planned {
  std::tuple<Problem, Device, int> key;  // the last: threads
  std::shared_ptr<const Plan> plan;
};

/// A plan out of those used last: steps of training ask for the same ones, each with another seed.
std::shared_ptr<const Plan> plan_of(Problem problem, const Device& device) {
  static std::mutex mutex;
  static auto& planned = *std::make_unique<std::list<Planned>>().release();  // threads may outlive what is static
  problem.dropout.seed = problem.dropout.offset = 0;
  const std::tuple key{problem, device, cpu::worker_count(0)};  // as many as the caller may use now
  {
    const std::lock_guard lock(mutex);
    const auto found = std::ranges::find(planned, key, &Planned::key);
    if (found != planned.end()) {
      planned.splice(planned.begin(), planned, found);
      return planned.front().plan;
    }
  }
  const auto make = problem.direction == Direction::kBackward ? plan_backward : plan_forward;
  auto plan = std::make_shared<const Plan>(make(problem, device, {}));
  const std::lock_guard lock(mutex);
  planned.push_front({key, plan});
  if (planned.size() > kMostPlans) planned.pop_back();
  return plan;
}

void execute(const Problem& problem, Inputs inputs, const Outputs& outputs) {
  const Device& device = inputs.q.device;
  const auto plan = plan_of(problem, device);
  inputs.dropout_draws = {problem.dropout.seed, problem.dropout.offset};
  plan->execute(inputs, outputs, ops_of(device).allocate(plan->workspace_bytes()).get());
}

}  // namespace

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, const Tensor& out,
            const Tensor& lse) {
  if (cpu::element_count(out) == 0) return;  // as of an empty batch, which is no problem of attention's
  execute(describe(Direction::kForward, q, k, v, options), operands(q, k, v, options), {.out = out, .lse = lse});
}

void attend_gradient(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     const Tensor& dout, const AttentionOptions& options, const Gradients& gradients) {
  if (cpu::element_count(q) + cpu::element_count(k) == 0) return;
  Inputs in = operands(q, k, v, options);
  in.out = out, in.lse = lse, in.dout = dout;
  execute(describe(Direction::kBackward, q, k, v, options), in,
          {.dq = gradients.dq, .dk = gradients.dk, .dv = gradients.dv});
}

}  // namespace fovea::nn
