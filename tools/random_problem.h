#pragma once

#include <fovea/problem.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace fovea::tools {

/// A small problem out of the whole option space, valid by construction, each option with every other.
[[nodiscard]] Problem random_problem(std::uint64_t seed);

/// The same where problems of one `kind` share what GPU kernels are specialised for: direction, dtype, head dims, and
/// which options that kernels know there are.
[[nodiscard]] Problem random_problem(std::uint64_t seed, std::uint64_t kind);

/// One thing a problem may ask for.
struct Option {
  const char* name;
  const char* choice;  ///< options of one choice exclude each other; empty: stands for itself
  bool (*holds)(const Problem& problem);
};

/// Every option whose company is counted.
[[nodiscard]] std::span<const Option> all_options();

/// Whether no valid problem can have both.
[[nodiscard]] bool exclude_each_other(const Option& a, const Option& b);

}  // namespace fovea::tools
