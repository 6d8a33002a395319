#pragma once

namespace fovea::python {

/// Handlers of XLA's foreign function interface for the CPU and for CUDA: what fovea.jax calls, forward and backward.
[[nodiscard]] void* xla_handler_cpu();
[[nodiscard]] void* xla_handler_cuda();

}  // namespace fovea::python
