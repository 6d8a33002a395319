#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fovea::tools {

/// The processor, as the system tells.
struct Processor {
  std::string model;                    ///< "unknown" where the system does not say
  std::string architecture;             ///< "x86_64", "aarch64"
  std::vector<std::string> extensions;  ///< vector instruction sets that matter to attention
  std::int64_t online = 0;              ///< logical processors of the machine
  std::int64_t l1_bytes = 0;            ///< data cache of one core; 0: unknown
  std::int64_t l2_bytes = 0;
  std::int64_t l3_bytes = 0;
  std::int64_t memory_bytes = 0;
};
[[nodiscard]] Processor processor();

/// Peak fp32 rate in FLOP/s (a multiply-add is two) that `threads` threads reach with independent FMAs of one
/// instruction set, measured for about `seconds`: the ceiling that kernels are held against.
[[nodiscard]] double fma_rate(const std::string& isa, int threads, double seconds);

}  // namespace fovea::tools
