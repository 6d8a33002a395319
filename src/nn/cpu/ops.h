#pragma once

#include "nn/ops.h"

namespace fovea::nn {

/// Layers on the CPU: products by oneDNN, the rest by row kernels compiled per instruction set.
[[nodiscard]] std::unique_ptr<const Ops> make_cpu_ops();

}  // namespace fovea::nn
