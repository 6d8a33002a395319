#include "nn/ops.h"

#include <cmath>
#include <map>
#include <mutex>

#include "nn/cpu/ops.h"
#include "nn/cuda/ops.h"
#include "problem/operands.h"

namespace fovea::nn {
namespace {

void execute(const Plan& plan, const Inputs& inputs, const Outputs& outputs) {
  const auto workspace = ops_of(plan.report().device).allocate(plan.workspace_bytes());
  plan.execute(inputs, outputs, workspace.get());
}

}  // namespace

const Ops& ops_of(const Device& device) {
  if (device.kind == DeviceKind::kCpu) {
    static const std::unique_ptr<const Ops> cpu = make_cpu_ops();
    return *cpu;
  }
  static std::mutex mutex;
  // Never taken apart: arrays of static storage may outlive everything here, and the driver with it.
  static auto& gpus = *std::make_unique<std::map<int, std::unique_ptr<const Ops>>>().release();
  const std::lock_guard lock(mutex);
  std::unique_ptr<const Ops>& ops = gpus[device.index];
  if (ops == nullptr) ops = make_cuda_ops(device.index);
  return *ops;
}

AdamWRates rates_of(const AdamWStep& s) {
  const double left1 = 1.0 - std::pow(static_cast<double>(s.beta1), static_cast<double>(s.step));
  const double left2 = 1.0 - std::pow(static_cast<double>(s.beta2), static_cast<double>(s.step));
  return {.rate = static_cast<float>(s.lr / left1),
          .spread = static_cast<float>(std::sqrt(left2)),
          .decay = 1.0F - s.lr * s.weight_decay};
}

void attend(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options, const Tensor& out,
            const Tensor& lse) {
  const Problem problem = describe(Direction::kForward, q, k, v, options);
  execute(plan_forward(problem, q.device, options), operands(q, k, v, options), {.out = out, .lse = lse});
}

void attend_gradient(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                     const Tensor& dout, const AttentionOptions& options, const Gradients& gradients) {
  const Problem problem = describe(Direction::kBackward, q, k, v, options);
  Inputs in = operands(q, k, v, options);
  in.out = out, in.lse = lse, in.dout = dout;
  execute(plan_backward(problem, q.device, options), in, {.dq = gradients.dq, .dk = gradients.dk, .dv = gradients.dv});
}

}  // namespace fovea::nn
