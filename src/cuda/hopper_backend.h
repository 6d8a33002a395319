#pragma once

#include <memory>

#include "dispatch/backend.h"

namespace fovea::cuda {

/// "cuda_hopper": forward passes in fp16 and bf16 on GPUs of compute capability 9.0.
[[nodiscard]] std::unique_ptr<Backend> make_hopper_backend();

}  // namespace fovea::cuda
