#pragma once

#include <memory>

#include "dispatch/backend.h"
#include "ladder.h"

namespace fovea::ladder {

[[nodiscard]] std::shared_ptr<const PlannedKernel> plan_on_gpu(int rung, const Problem& problem, Direction pass,
                                                               int gpu);

}  // namespace fovea::ladder
