#pragma once

#include <memory>
#include <string>
#include <vector>

#include "dispatch/backend.h"

namespace fovea::cpu {

/// The tiled attention of src/cpu/flash, one backend an instruction set, best first: "cpu_avx512", "cpu_avx2",
/// "cpu_portable".  FOVEA_CPU_ISA=avx512|avx2|portable makes all others refuse.
[[nodiscard]] std::vector<std::unique_ptr<const Backend>> make_flash_backends();

/// The instruction sets compiled in that this CPU has, best first: "avx512", "avx2", "portable".
[[nodiscard]] std::vector<std::string> available_isas();

/// Peak fp32 rate in FLOP/s (a multiply-add is two) that `threads` threads reach with independent FMAs of one
/// instruction set, measured for about `seconds`: the ceiling that kernels are held against.
[[nodiscard]] double measure_fma_rate(const std::string& isa, int threads, double seconds);

}  // namespace fovea::cpu
