#pragma once

#include <memory>

#include "dispatch/backend.h"
#include "ladder.h"
#include "params.h"

namespace fovea::ladder {

[[nodiscard]] std::shared_ptr<const PlannedKernel> plan_on_cpu(int rung, const Problem& problem, Direction pass);

// The twins: each rung in plain C++, fp32.  Tensors and workspace are those of a GPU's kernels.
void formula_forward(const Params& p, int dim, i64 heads);
void formula_backward(const Params& p, int dim, i64 heads);
void flash_forward(const Params& p, int dim, i64 heads, bool over_sequence);
void flash_backward(const Params& p, int dim, i64 heads, bool over_sequence);
void flash2_forward(const Params& p, int dim, i64 heads);

}  // namespace fovea::ladder
