#pragma once

#include <memory>

#include "dispatch/backend.h"

namespace fovea::cuda {

/// "cuda_portable": the whole contract on every NVIDIA GPU from Turing on.
[[nodiscard]] std::unique_ptr<Backend> make_portable_backend();

}  // namespace fovea::cuda
