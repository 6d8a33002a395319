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

/// Whether an instruction set multiplies pairs of bf16, at a rate of their own.
[[nodiscard]] bool multiplies_pairs(const std::string& isa);

/// Peak rate in FLOP/s (a multiply-add is two) that `threads` threads reach with independent FMAs of one instruction
/// set, or with products of bf16 pairs, measured for about `seconds`: the ceiling that kernels are held against.
[[nodiscard]] double fma_rate(const std::string& isa, bool pairs, int threads, double seconds);

}  // namespace fovea::tools
