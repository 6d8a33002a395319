#pragma once

#include "nn/ops.h"

namespace fovea::nn {

/// Layers on a GPU: products by cuBLASLt, the rest by kernels of src/nn/cuda/kernels, all in the default stream;
/// nothing waits for the device but what is copied to the host.  Throws Error where the GPU or cuBLASLt is not there.
[[nodiscard]] std::unique_ptr<const Ops> make_cuda_ops(int gpu);

}  // namespace fovea::nn
