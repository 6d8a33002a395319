#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fovea::emulator {

/// What cuTensorMapEncodeTiled makes: a tensor of up to five dimensions, and the box that is copied, in swizzled rows.
struct TensorMap {
  static constexpr std::uint64_t kMagic = 0x70616d20736e6574;
  static constexpr std::size_t kMostDimensions = 5;
  std::uint64_t magic, address;
  std::array<std::uint64_t, kMostDimensions> sizes;        ///< elements, the innermost first
  std::array<std::uint64_t, kMostDimensions - 1> strides;  ///< bytes, of all but the innermost
  std::array<std::uint32_t, kMostDimensions> box;
  std::int32_t element;  ///< bytes
  std::uint32_t rank;    ///< dimensions that it has; the rest are one
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace fovea::emulator
