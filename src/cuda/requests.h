#pragma once

#include <fovea/problem.h>

#include <string>
#include <vector>

#include "cuda/forward_tuning.h"
#include "cuda/jit/request.h"

namespace fovea::cuda {

/// Every kernel that plans of this problem and `direction` (kForward or kBackward) may run on GPUs of an architecture,
/// for `fovea precompile` and the compile ring.  Empty where no GPU backend takes the problem.  Needs no GPU.
[[nodiscard]] std::vector<jit::KernelRequest> requests(const Problem& given, Direction direction, int arch);

struct OfferedTile {
  std::string name;
  std::vector<jit::KernelRequest> kernels;  ///< that the pass runs, the main one first
};
/// Every tile that a backend could run a problem of one direction with on this GPU: what `fovea tune` chooses from.
[[nodiscard]] std::vector<OfferedTile> tiles_on_offer(const Problem& given, const std::string& backend,
                                                      const GpuModel& gpu);

}  // namespace fovea::cuda
