#pragma once

#include <fovea/plan.h>

#include <vector>

namespace fovea::cpu {

/// One result of the oracle, densely packed in the shape of its tensor, and for each element the size of what was added up
/// to get it (the sum of the absolute terms): the yardstick of what one rounding costs there (docs/contract.md, "Error rule").
struct Exact {
  std::vector<double> value;
  std::vector<double> magnitude;
};

/// What the oracle gives; gradients only where the problem goes backward.
struct ReferenceResult {
  Exact out, lse;
  Exact dq, dk, dv, dbias, dalibi_slopes, dsink;
};

/// THE ORACLE: attention and its gradients in double precision, O(N²), straight from the formula of docs/contract.md.  It
/// shares no code with what it judges: it includes nothing of src/math and decides visibility, dropout and corners itself.
/// Backward it recomputes everything from q, k, v; `inputs.out` and `inputs.lse` are not read.
[[nodiscard]] ReferenceResult reference(const Problem& problem, const Inputs& inputs);

}  // namespace fovea::cpu
