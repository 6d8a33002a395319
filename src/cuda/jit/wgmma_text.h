#pragma once

#include <initializer_list>
#include <string>

#include "cuda/spec.h"

namespace fovea::cuda::jit {

/// The products of kernels/hopper/wgmma.cuh for results `columns` wide: one instruction takes every register of the
/// result by name, up to 128 of them, so its text is made, not written.
[[nodiscard]] std::string wgmma_text(Type type, std::initializer_list<int> columns);

}  // namespace fovea::cuda::jit
