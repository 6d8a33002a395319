#pragma once

#include <cstddef>
#include <map>
#include <string>

namespace fovea::ladder {

struct Params;
using Kernel = void (*)(const Params&);

inline constexpr std::size_t kMostShared = 227 << 10;  // of a block on Hopper

/// A kernel by what the device text is instantiated as.
[[nodiscard]] Kernel emulated(const std::string& function, int head_dim);
[[nodiscard]] std::byte* emulated_shared();

}  // namespace fovea::ladder
