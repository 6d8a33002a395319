#include "nn/ops.h"
#include "problem/operands.h"

namespace fovea::nn {
namespace {

void execute(const Plan& plan, const Inputs& inputs, const Outputs& outputs) {
  const auto workspace = ops_of(plan.report().device).allocate(plan.workspace_bytes());
  plan.execute(inputs, outputs, workspace.get());
}

}  // namespace

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
