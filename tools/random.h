#pragma once

#include <cstddef>
#include <cstdint>

namespace fovea::tools {

/// Counter-based random numbers: number `i` of a stream depends on (seed, stream, i) alone.
class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : base_(mix(seed + mix(stream))) {}

  [[nodiscard]] std::uint64_t bits(std::uint64_t i) const { return mix(base_ + i * 0x9e3779b97f4a7c15U); }

  /// In [0, 1).
  [[nodiscard]] double uniform(std::uint64_t i) const { return static_cast<double>(bits(i) >> 11) * 0x1p-53; }

  /// Nearly standard normal: the sum of four uniform 16-bit numbers, within ±3.5.
  [[nodiscard]] double normal(std::uint64_t i) const {
    const std::uint64_t x = bits(i);
    const auto sum = static_cast<double>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
    return (sum - 2.0 * 65535.0) * (1.7320508075688772 / 65536.0);
  }

 private:
  [[nodiscard]] static std::uint64_t mix(std::uint64_t x) {  // splitmix64's
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
    return x ^ (x >> 31);
  }

  std::uint64_t base_;
};

/// The numbers of a stream one after the other, for what is decided step by step.
class Draw {
 public:
  explicit Draw(std::uint64_t seed, std::uint64_t stream = 0) : random_(seed, stream) {}

  [[nodiscard]] std::uint64_t bits() { return random_.bits(next_++); }
  [[nodiscard]] bool chance(double probability) { return random_.uniform(next_++) < probability; }

  /// In [least, most].
  [[nodiscard]] std::int64_t between(std::int64_t least, std::int64_t most) {
    return least + static_cast<std::int64_t>(random_.uniform(next_++) * static_cast<double>(most - least + 1));
  }

  template <class T, std::size_t N>
  [[nodiscard]] T one_of(const T (&values)[N]) {
    return values[between(0, static_cast<std::int64_t>(N) - 1)];
  }

 private:
  Random random_;
  std::uint64_t next_ = 0;
};

}  // namespace fovea::tools
