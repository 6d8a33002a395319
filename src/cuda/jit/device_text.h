#pragma once

#include "cuda/nvrtc.h"

// Made by cmake/embed_device_text.cmake.
namespace fovea::cuda::jit {

/// Every header that kernels are compiled from, by the name they include it under.
extern const std::span<const Header> device_text;

/// Changes whenever any of them does: 16 hexadecimal digits.
extern const std::string_view build_id;

}  // namespace fovea::cuda::jit
