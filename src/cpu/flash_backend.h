#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cpu/flash/call.h"
#include "dispatch/backend.h"

namespace fovea::cpu {

/// The tiled attention of src/cpu/flash, one backend an instruction set, best first: "cpu_amx", "cpu_avx512_bf16",
/// "cpu_avx512", "cpu_avx2", "cpu_portable".  FOVEA_CPU_ISA names one (without "cpu_") and makes all others refuse.
[[nodiscard]] std::vector<std::unique_ptr<const Backend>> make_flash_backends();

/// The instruction sets compiled in that this CPU has, in the same order and without "cpu_".
[[nodiscard]] std::vector<std::string> available_isas();

/// The code of one of them.
[[nodiscard]] const FlashKernels& flash_kernels(const std::string& isa);

}  // namespace fovea::cpu
