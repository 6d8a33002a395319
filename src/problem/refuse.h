#pragma once

#include <fovea/error.h>
#include <fovea/tensor.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <locale>
#include <new>
#include <span>
#include <sstream>
#include <string>
#include <string_view>

namespace fovea {

/// Throws Error(kInvalidArgument); the parts make one sentence, the same in every locale.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  sentence.imbue(std::locale::classic());
  (sentence << ... << parts);
  throw Error(ErrorCode::kInvalidArgument, sentence.str());
}

/// There is one CPU, whatever its index.
[[nodiscard]] inline bool on_one(const Device& a, const Device& b) {
  return a.kind == b.kind && (a.kind == DeviceKind::kCpu || a.index == b.index);
}

/// Refuses a tensor on another device; `wants`: "the plan is for".
inline void check_device(const char* tensor, const Device& device, const char* wants, const Device& wanted) {
  if (on_one(device, wanted)) return;
  refuse(tensor, " is on ", name(device), " but ", wants, " ", name(wanted));
}

inline constexpr const char* kMemoryRanOut = "memory ran out; free some, or pose a smaller problem";

/// Runs a call of the public interface, where running out of memory must be an Error too.
template <typename Call>
auto or_out_of_memory(const Call& call) {
  try {
    return call();
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::kOutOfMemory, kMemoryRanOut);
  }
}

/// The shortest text that reads back as the same number; −0 is 0.
[[nodiscard]] inline std::string shortest(float value) {
  std::array<char, 32> buffer;
  const auto end = std::to_chars(buffer.begin(), buffer.end(), value == 0.0F ? 0.0F : value).ptr;
  return {buffer.data(), end};
}

inline void check_real(const char* field, float value, bool in_range, const char* rule) {
  if (!std::isfinite(value) || !in_range) refuse(field, " (", shortest(value), ") must be ", rule);
}

/// Bytes of the character of UTF-8 that the text begins with; 0 where there is none, or none to print.
[[nodiscard]] inline std::size_t printable_bytes(std::string_view text) {
  const auto first = static_cast<unsigned char>(text[0]);
  if (first < 0x80) return first >= ' ' && first <= '~' ? 1 : 0;
  const std::size_t count = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || text.size() < count) return 0;
  std::uint32_t code = first & (0x7FU >> count);
  for (const char c : text.substr(1, count - 1)) {
    if ((static_cast<unsigned char>(c) & 0xC0U) != 0x80) return 0;
    code = code << 6 | (static_cast<unsigned char>(c) & 0x3FU);
  }
  constexpr std::array<std::uint32_t, 3> kLeast = {0xA0, 0x800, 0x10000};  // 0x80 to 0x9F are control characters
  const bool surrogate = code >= 0xD800 && code <= 0xDFFF;
  const bool turns = (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);  // line or direction
  return code >= kLeast[count - 2] && code <= 0x10FFFF && !surrogate && !turns ? count : 0;
}

/// The user's text, safe to print: short, UTF-8, and without control characters, the same in every locale.
[[nodiscard]] inline std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 60;
  std::string quoted = "'";
  while (!text.empty() && quoted.size() <= kLongest) {
    const std::size_t count = printable_bytes(text);
    quoted += count > 0 ? text.substr(0, count) : "?";
    text.remove_prefix(std::max<std::size_t>(count, 1));
  }
  return quoted + (text.empty() ? "'" : "...'");
}

/// Refuses what no enumerator has, as a cast of a wrong number gives it; `last`: the greatest.
void check_named(const char* field, auto value, decltype(value) last) {
  if (value > last) refuse(field, " (", static_cast<int>(value), ") must be one of the values that have names");
}

/// "700+1300+96" with separator "+".
[[nodiscard]] inline std::string join(std::span<const std::int64_t> values, std::string_view separator) {
  std::string text;
  for (const std::int64_t value : values) text.append(text.empty() ? "" : separator).append(std::to_string(value));
  return text;
}

/// "[2, 128, 16, 64]".
[[nodiscard]] inline std::string shape_text(const Tensor& tensor) {
  return "[" + join({tensor.shape.data(), std::min<std::size_t>(tensor.rank, Tensor::kMaxRank)}, ", ") + "]";
}

/// The sum, or the largest number there is where it does not fit.
[[nodiscard]] inline std::int64_t saturating_sum(std::span<const std::int64_t> values) noexcept {
  std::int64_t sum = 0;
  for (const std::int64_t value : values) {
    if (__builtin_add_overflow(sum, value, &sum)) return std::numeric_limits<std::int64_t>::max();
  }
  return sum;
}

[[nodiscard]] inline std::int64_t longest(std::span<const std::int64_t> values) noexcept {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

}  // namespace fovea
