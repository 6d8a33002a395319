#pragma once

#include <fovea/problem.h>

#include <string>
#include <vector>

#include "cuda/forward_tuning.h"
#include "cuda/jit/request.h"

namespace fovea::cuda {

/// Every kernel that a plan of this problem's `direction` (kForward or kBackward) would run on an architecture: what
/// `fovea precompile` and the compile ring ask.  Empty where no GPU backend takes the problem.  Needs no GPU.
[[nodiscard]] std::vector<jit::KernelRequest> requests(const Problem& problem, Direction direction, int arch);

struct OfferedTile {
  std::string name;
  std::vector<jit::KernelRequest> kernels;  ///< that the pass runs, the main one first
};
/// Every tile that a GPU's backend could run a problem of one direction with: what `fovea tune` chooses from.
[[nodiscard]] std::vector<OfferedTile> tiles_on_offer(const Problem& problem, const std::string& backend,
                                                      const GpuModel& gpu);

}  // namespace fovea::cuda
