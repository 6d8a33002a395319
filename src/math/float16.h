#pragma once

#include "math/fn.h"

namespace fovea::math {

FOVEA_FN constexpr float float_of_bits(u32 bits) { return __builtin_bit_cast(float, bits); }
FOVEA_FN constexpr u32 bits_of_float(float x) { return __builtin_bit_cast(u32, x); }

FOVEA_FN constexpr float float_of_bf16(u16 x) { return float_of_bits(u32{x} << 16); }

/// Round to nearest, ties to even; NaN stays NaN.
FOVEA_FN constexpr u16 bf16_of_float(float x) {
  const u32 bits = bits_of_float(x);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<u16>((bits >> 16) | 0x40U);
  return static_cast<u16>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

FOVEA_FN constexpr float float_of_half(u16 x) {
  const u32 sign = (u32{x} & 0x8000U) << 16, rest = u32{x} & 0x7fffU;
  if (rest >= 0x7c00U) return float_of_bits(sign | 0x7f800000U | (rest << 13));     // infinity, NaN
  if (rest >= 0x0400U) return float_of_bits(sign | ((rest << 13) + (112U << 23)));  // normal
  const float tiny = float_of_bits((rest << 13) + (113U << 23)) - 6.103515625e-05F;  // subnormal: 2^-14·(1 + m) − 2^-14
  return float_of_bits(sign | bits_of_float(tiny));
}

/// Round to nearest, ties to even; overflow gives infinity, NaN stays NaN.
FOVEA_FN constexpr u16 half_of_float(float x) {
  const u32 bits = bits_of_float(x), sign = (bits >> 16) & 0x8000U, rest = bits & 0x7fffffffU;
  if (rest > 0x7f800000U) return static_cast<u16>(sign | 0x7e00U);
  if (rest >= 0x477ff000U) return static_cast<u16>(sign | 0x7c00U);
  if (rest < 0x38800000U)
    return static_cast<u16>(sign | (bits_of_float(float_of_bits(rest) + 0.5F) & 0x7fffU));  // subnormal
  return static_cast<u16>(sign | ((rest - (112U << 23) + 0xfffU + ((rest >> 13) & 1U)) >> 13));
}

}  // namespace fovea::math
