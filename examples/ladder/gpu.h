#pragma once

#include <memory>

#include "dispatch/backend.h"
#include "ladder.h"

namespace fovea::ladder {

inline constexpr int kLeastCapability = 80;  // for cp.async and mma of bf16

[[nodiscard]] std::shared_ptr<const PlannedKernel> plan_on_gpu(int rung, const Problem& problem, Direction pass,
                                                               int gpu);

}  // namespace fovea::ladder
