#pragma once

#include <fovea/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fovea::cpu {

/// Single elements as the oracle and the tools see them: doubles.  Written apart from src/math, whose conversions the
/// kernels use, because it judges them.
struct FloatFormat {
  int mantissa_bits;  ///< stored ones
  int min_exponent;   ///< of the smallest normal number
  double largest;
  [[nodiscard]] double unit_roundoff() const { return std::ldexp(1.0, -mantissa_bits - 1); }
  [[nodiscard]] double smallest_normal() const { return std::ldexp(1.0, min_exponent); }
};

[[nodiscard]] constexpr FloatFormat format_of(DType dtype) {
  if (dtype == DType::kFloat16) return {10, -14, 65504.0};
  if (dtype == DType::kBFloat16) return {7, -126, 0x1.fep127};
  return {23, -126, 0x1.fffffep127};
}

/// To the nearest number of a format, ties to even.
[[nodiscard]] inline double round_to(const FloatFormat& format, double x) {
  if (!std::isfinite(x)) return x;
  constexpr std::uint64_t kExponent = 0x7ff0000000000000U;
  const std::uint64_t least = static_cast<std::uint64_t>(format.min_exponent + 1023) << 52;
  const std::uint64_t exponent = std::max(std::bit_cast<std::uint64_t>(x) & kExponent, least);
  // 1.5·2^k is so large that the sum keeps only the bits the format has.
  const std::uint64_t k = exponent + (static_cast<std::uint64_t>(52 - format.mantissa_bits) << 52);
  const double large = 1.5 * std::bit_cast<double>(k);
  const double rounded = (x + large) - large;
  if (std::abs(rounded) > format.largest) return std::copysign(HUGE_VAL, x);
  return std::copysign(rounded, x);
}

[[nodiscard]] inline double decode_half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double x = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 31) x = mantissa == 0 ? HUGE_VAL : std::nan("");
  return (bits & 0x8000) != 0 ? -x : x;
}

[[nodiscard]] inline std::uint16_t encode_half(double x) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
  if (std::isnan(x)) return 0x7e00;
  const double size = std::abs(round_to(format_of(DType::kFloat16), x));
  if (std::isinf(size)) return static_cast<std::uint16_t>(sign | 0x7c00);
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const auto steps = static_cast<int>(std::ldexp(size, 10 - exponent));  // 1024 and more where it is normal
  return static_cast<std::uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

[[nodiscard]] inline double load(const Tensor& t, std::int64_t offset) {
  switch (t.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(t.data)[offset];
    case DType::kFloat16:
      return decode_half(static_cast<const std::uint16_t*>(t.data)[offset]);
    case DType::kBFloat16:
      return std::bit_cast<float>(static_cast<std::uint32_t>(static_cast<const std::uint16_t*>(t.data)[offset]) << 16);
    case DType::kBool:
      return static_cast<const std::uint8_t*>(t.data)[offset] != 0 ? 1.0 : 0.0;
    case DType::kInt32:
      return static_cast<const std::int32_t*>(t.data)[offset];
  }
  return 0.0;
}

/// Rounds once, to nearest, ties to even.
inline void store(const Tensor& t, std::int64_t offset, double x) {
  switch (t.dtype) {
    case DType::kFloat32:
      static_cast<float*>(t.data)[offset] = static_cast<float>(x);  // NOLINT(clang-analyzer-core.NullDereference)
      break;
    case DType::kFloat16:
      static_cast<std::uint16_t*>(t.data)[offset] = encode_half(x);
      break;
    case DType::kBFloat16: {
      const auto rounded = static_cast<float>(round_to(format_of(t.dtype), x));
      static_cast<std::uint16_t*>(t.data)[offset] =
          std::isnan(x) ? 0x7fc0 : static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rounded) >> 16);
      break;
    }
    case DType::kBool:
      static_cast<std::uint8_t*>(t.data)[offset] = x != 0.0 ? 1 : 0;
      break;
    case DType::kInt32:
      static_cast<std::int32_t*>(t.data)[offset] = static_cast<std::int32_t>(x);
      break;
  }
}

/// Calls visit(index, offset) for every element: its number in dense order, and where it lies.
template <class Visit>
void for_each_element(const Tensor& t, const Visit& visit) {
  std::array<std::int64_t, Tensor::kMaxRank> shape{1, 1, 1, 1}, strides{};
  for (int i = 0; i < t.rank; ++i) {
    shape[i + Tensor::kMaxRank - t.rank] = t.shape[i];
    strides[i + Tensor::kMaxRank - t.rank] = t.strides[i];
  }
  std::int64_t index = 0;
  for (std::int64_t a = 0; a < shape[0]; ++a) {
    for (std::int64_t b = 0; b < shape[1]; ++b) {
      for (std::int64_t c = 0; c < shape[2]; ++c) {
        const std::int64_t row = a * strides[0] + b * strides[1] + c * strides[2];
        for (std::int64_t d = 0; d < shape[3]; ++d) visit(index++, row + d * strides[3]);
      }
    }
  }
}

[[nodiscard]] inline std::int64_t element_count(const Tensor& t) {
  std::int64_t count = t.defined() ? 1 : 0;
  for (int i = 0; i < t.rank; ++i) count *= t.shape[i];
  return count;
}

/// All elements in dense order; none of an undefined tensor.
[[nodiscard]] inline std::vector<double> load_all(const Tensor& t) {
  std::vector<double> values(static_cast<std::size_t>(element_count(t)));
  if (t.defined())
    for_each_element(t, [&](std::int64_t index, std::int64_t offset) { values[index] = load(t, offset); });
  return values;
}

inline void store_all(const Tensor& t, const std::vector<double>& values) {
  if (t.defined())
    for_each_element(t, [&](std::int64_t index, std::int64_t offset) { store(t, offset, values[index]); });
}

}  // namespace fovea::cpu
