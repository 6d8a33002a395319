#pragma once

#include <functional>

#include "cuda/jit/request.h"

namespace fovea::cuda::jit {

/// Who compiles: NVRTC, or what a test puts in its place.
struct Compiler {
  std::function<std::string()> name;  ///< "NVRTC 13.0", part of a kernel's identity on the disk; "" where there is none
  std::function<Binary(const KernelRequest&)> compile;
};

/// NVRTC, which is opened when first asked for something.  It throws Error where there is no NVRTC, where it does not
/// know the architecture, and where the unit does not compile: with the first error, and where source and log are.
[[nodiscard]] Compiler nvrtc();

/// Registers, spills and so on, out of what the assembler says.
void read_log(const std::string& log, Binary& binary);

}  // namespace fovea::cuda::jit
