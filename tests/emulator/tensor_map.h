#pragma once

#include <array>
#include <cstdint>

namespace fovea::emulator {

/// What cuTensorMapEncodeTiled makes: a tensor of four dimensions, and the box that is copied, in swizzled rows.
struct TensorMap {
  static constexpr std::uint64_t kMagic = 0x70616d20736e6574;
  std::uint64_t magic, address;
  std::array<std::uint64_t, 4> sizes;    ///< elements, the innermost first
  std::array<std::uint64_t, 3> strides;  ///< bytes, of all but the innermost
  std::array<std::uint32_t, 4> box;
  std::int32_t element;  ///< bytes
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace fovea::emulator
