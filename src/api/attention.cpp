#include <fovea/attention.h>

#include "dispatch/backend.h"
#include "problem/operands.h"
#include "problem/refuse.h"

namespace fovea {
namespace {

/// Executes a plan with a workspace of its own.
void execute(const Plan& plan, const Inputs& inputs, const Outputs& outputs) {
  const auto workspace = dispatch::make_workspace(plan.report().device, plan.workspace_bytes());
  plan.execute(inputs, outputs, workspace.get());
}

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& options,
                       const Tensor& out, const Tensor& lse) {
  or_out_of_memory([&] {
    const Problem problem = describe(Direction::kForward, q, k, v, options);
    execute(plan_forward(problem, q.device, options), operands(q, k, v, options), {.out = out, .lse = lse});
  });
}

void attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                        const Tensor& dout, const AttentionOptions& options, const Gradients& gradients,
                        const Tensor& dlse) {
  or_out_of_memory([&] {
    const Problem problem = describe(Direction::kBackward, q, k, v, options);
    Inputs in = operands(q, k, v, options);
    in.out = out;
    in.lse = lse;
    in.dout = dout;
    in.dlse = dlse;
    execute(plan_backward(problem, q.device, options), in,
            {.dq = gradients.dq,
             .dk = gradients.dk,
             .dv = gradients.dv,
             .dbias = gradients.dbias,
             .dalibi_slopes = gradients.dalibi_slopes,
             .dsink = gradients.dsink});
  });
}

}  // namespace fovea
