#pragma once

#include <filesystem>
#include <functional>

#include "cuda/jit/request.h"

namespace fovea::cuda::jit {

/// Who compiles: NVRTC, or what a test puts in its place.
struct Compiler {
  /// "NVRTC 13.0", part of a kernel's identity on the disk; "" where there is none.  Unless `surely`, it may go by what
  /// was so last time.
  std::function<std::string(bool surely)> name;
  std::function<Binary(const KernelRequest&)> compile;
};

/// NVRTC, which is opened when it must be: that takes longer than to load a kernel, so a file in `folder` (empty: none)
/// remembers its version.  It throws Error where there is no NVRTC, where it does not know the architecture, and where
/// the unit does not compile: with the first error, and where source and log are.
[[nodiscard]] Compiler nvrtc(const std::filesystem::path& folder = {});

/// Registers, spills and so on, out of what the assembler says.
void read_log(const std::string& log, Binary& binary);

}  // namespace fovea::cuda::jit
