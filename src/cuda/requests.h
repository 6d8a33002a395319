#pragma once

#include <fovea/problem.h>

#include <vector>

#include "cuda/jit/request.h"

namespace fovea::cuda {

/// Every kernel that a plan of this problem's `direction` (kForward or kBackward) would run on an architecture: what
/// `fovea precompile` and the compile ring ask.  Empty where no GPU backend takes the problem.  Needs no GPU.
[[nodiscard]] std::vector<jit::KernelRequest> requests(const Problem& problem, Direction direction, int arch);

}  // namespace fovea::cuda
