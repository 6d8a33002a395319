#pragma once

#include <functional>

#include "cuda/jit/request.h"

namespace fovea::cuda::jit {

/// Who compiles: NVRTC, or what a test puts in its place.
struct Compiler {
  std::string name;  ///< "NVRTC 13.0": part of a compiled kernel's identity on the disk
  std::function<Binary(const KernelRequest&)> compile;
};

/// Where NVRTC knows the architecture.  Throws Error where there is no NVRTC, where it does not, and where the unit
/// does not compile: with the first error, and where source and log were saved.
[[nodiscard]] Binary compile(const KernelRequest& request);

/// Registers, spills and so on, out of what the assembler says.
void read_log(const std::string& log, Binary& binary);

}  // namespace fovea::cuda::jit
