#pragma once

#include <memory>
#include <optional>

#include "cuda/backward_tuning.h"
#include "dispatch/backend.h"

// The Hopper family's backward: the portable kernels around a main kernel of its own.
namespace fovea::cuda {

/// Nothing where the family has no tile for the problem.
[[nodiscard]] std::optional<BackwardShape> choose_backward_sm90(const Problem& given, const GpuModel& gpu);
[[nodiscard]] jit::KernelRequest backward_sm90_request(const BackwardShape& shape);
/// The kernel of the bias gradient; nothing where the portable one computes it.
[[nodiscard]] std::optional<jit::KernelRequest> bias_gradient_sm90_request(const Problem& problem,
                                                                           const BackwardShape& shape);

[[nodiscard]] std::shared_ptr<const PlannedKernel> plan_backward_sm90(const Problem& problem, const Device& device);

}  // namespace fovea::cuda
