#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "math/float16.h"
#include "tests/emulator/ptx.h"

// Numbers as the instructions have them.
namespace fovea::emulator {

enum class Float : int { kF16, kBf16, kTf32, kF32 };

inline float as_float(u32 bits) { return std::bit_cast<float>(bits); }
inline u32 bits_of(float x) { return std::bit_cast<u32>(x); }

inline float widen(Float type, u32 bits) {
  switch (type) {
    case Float::kF16:
      return math::float_of_half(static_cast<std::uint16_t>(bits));
    case Float::kBf16:
      return as_float(bits << 16);
    case Float::kTf32:
      return as_float(bits & 0xffffe000U);
    default:
      return as_float(bits);
  }
}
inline u32 narrow(Float type, float x) {
  if (type == Float::kF16) return math::half_of_float(x);
  if (type == Float::kBf16) return math::bf16_of_float(x);
  return bits_of(x);
}

/// Results below the smallest normal number are 0.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126F ? std::copysign(0.0F, x) : x; }

/// The nearest float towards 0.
inline float toward_zero(double x) {
  const auto near = static_cast<float>(x);
  return std::isfinite(x) && std::fabs(static_cast<double>(near)) > std::fabs(x) ? std::nextafterf(near, 0.0F) : near;
}

}  // namespace fovea::emulator
