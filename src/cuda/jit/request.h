#pragma once

#include <fovea/export.h>

#include <array>
#include <cstdint>
#include <string>

namespace fovea::cuda::jit {

/// A kernel to be had: what `render` makes of a spec.
struct KernelRequest {
  std::string name;            ///< for people: forward_bf16_d128_band
  std::string unit;            ///< the source to compile, whole but for the embedded headers it includes
  int arch = 0;                ///< 90 for sm_90
  bool arch_specific = false;  ///< uses what only this architecture has: compiled for sm_90a, not sm_90
  int threads = 0;             ///< of a block, and
  int shared_bytes = 0;        ///< what it is launched with, for reports: the key does not know them, nor
  bool early = false;          ///< whether it waits for the kernel ahead itself (`await_kernel_ahead`)
};

/// The kernel of every unit.
inline constexpr const char* kEntryPoint = "fovea_kernel";

enum class Source : std::uint8_t { kPack, kDisk, kCompiled };

/// "pack", "disk", "compiled".
[[nodiscard]] const char* name(Source source);

/// A compiled kernel.
struct Binary {
  std::string key;       ///< content_key of the request
  std::string name;      ///< the request's
  int arch = 0;          ///< likewise
  std::string compiler;  ///< "NVRTC 13.0"
  int registers = 0;     ///< of a thread
  int spill_bytes = 0;   ///< stored and loaded, of a thread
  int local_bytes = 0;   ///< stack frame of a thread
  int shared_bytes = 0;  ///< static, of a block
  double seconds = 0;    ///< that compiling took
  std::string warnings;  ///< of the compiler and the assembler in one line, empty where there were none
  std::string cubin;
  Source source = Source::kCompiled;  ///< where this process has it from
};

/// What makes a compiled kernel the right one, whoever compiled it: all device text, the unit, the architecture and
/// the options.  32 hexadecimal digits; no paths and no machine are in it.
[[nodiscard]] std::string content_key(const KernelRequest& request);

/// "sm_90", "sm_90a".
[[nodiscard]] std::string target_of(const KernelRequest& request);

/// What kernels are compiled for, where NVRTC knows it.
inline constexpr std::array kArchs{75, 80, 86, 87, 89, 90, 100, 110, 120};

/// The architecture whose kernels a GPU runs; 0 where there is none.
[[nodiscard]] FOVEA_API int arch_of(int compute_capability);

}  // namespace fovea::cuda::jit
