// The rules that kernels share: the band, 16-bit floats, and what the vectors compute.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "cpu/elements.h"
#include "math/band.h"
#include "math/float16.h"

namespace fovea {
namespace {

using math::Band;
using math::Interval;
using math::TileState;

/// The rule as docs/contract.md states it, entry by entry.
bool states(const Band& band, std::int64_t i, std::int64_t j) {
  const std::int64_t after_diagonal = j - (i + band.offset);
  return i < band.seqlen_q && j < band.seqlen_kv && after_diagonal <= band.right && -after_diagonal <= band.left;
}

Band random_band(std::mt19937& random) {
  const auto upto = [&](int n) { return static_cast<std::int64_t>(random() % static_cast<unsigned>(n + 1)); };
  Band band{upto(30), upto(30)};
  band.offset = random() % 2 == 0 ? 0 : band.seqlen_kv - band.seqlen_q;
  if (random() % 2 == 0) band.left = upto(12);
  if (random() % 2 == 0) band.right = upto(12);
  return band;
}

TEST(Band, SeesWhatTheContractStates) {
  std::mt19937 random(1);
  for (int round = 0; round < 500; ++round) {
    const Band band = random_band(random);
    for (std::int64_t i = 0; i < 34; ++i) {
      for (std::int64_t j = 0; j < 34; ++j) {
        EXPECT_EQ(band.visible(i, j), states(band, i, j)) << i << " " << j;
        EXPECT_EQ(band.rows_of_key(j).contains(i), states(band, i, j)) << i << " " << j;
      }
    }
  }
}

TEST(Band, NeverSkipsATileThatShowsSomethingNorPassesOneThatHidesSomething) {
  std::mt19937 random(2);
  int seen[3] = {};
  for (int round = 0; round < 5000; ++round) {
    const Band band = random_band(random);
    const auto interval = [&] {
      const auto begin = static_cast<std::int64_t>(random() % 30);
      return Interval{begin, begin + 1 + static_cast<std::int64_t>(random() % 9)};
    };
    const Interval rows = interval(), keys = interval();
    int visible = 0, all = 0;
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      for (std::int64_t j = keys.begin; j < keys.end; ++j, ++all) visible += states(band, i, j) ? 1 : 0;
    }
    const TileState state = band.tile(rows, keys);
    ++seen[static_cast<int>(state)];
    EXPECT_TRUE(visible == 0 || state != TileState::kHidden);
    EXPECT_TRUE(visible == all || state != TileState::kFull);
    const Interval key_hull = band.keys_of_rows(rows), row_hull = band.rows_of_keys(keys);
    for (std::int64_t i = rows.begin; i < rows.end; ++i) {
      for (std::int64_t j = 0; j < 40; ++j) EXPECT_TRUE(!states(band, i, j) || key_hull.contains(j));
    }
    for (std::int64_t j = keys.begin; j < keys.end; ++j) {
      for (std::int64_t i = 0; i < 40; ++i) EXPECT_TRUE(!states(band, i, j) || row_hull.contains(i));
    }
  }
  for (const int count : seen) EXPECT_GT(count, 100);
}

TEST(Float16, EveryHalfAndBfloatGoesToFloatAndBack) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto x = static_cast<std::uint16_t>(bits);
    const float half = math::float_of_half(x), bfloat = math::float_of_bf16(x);
    if (!std::isnan(half)) {
      EXPECT_EQ(half, static_cast<float>(cpu::decode_half(x)));
      EXPECT_EQ(math::half_of_float(half), x);
    } else {
      EXPECT_TRUE(std::isnan(math::float_of_half(math::half_of_float(half))));
    }
    if (!std::isnan(bfloat)) {
      EXPECT_EQ(math::bf16_of_float(bfloat), x);
    } else {
      EXPECT_TRUE(std::isnan(math::float_of_bf16(math::bf16_of_float(bfloat))));
    }
  }
}

TEST(Float16, RoundsToNearestEven) {
  std::mt19937 random(3);
  const auto rounded = [](DType dtype, float x) {
    return static_cast<float>(cpu::round_to(cpu::format_of(dtype), static_cast<double>(x)));
  };
  for (int round = 0; round < 2000000; ++round) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(x)) continue;
    ASSERT_EQ(math::float_of_half(math::half_of_float(x)), rounded(DType::kFloat16, x)) << x;
    ASSERT_EQ(math::float_of_bf16(math::bf16_of_float(x)), rounded(DType::kBFloat16, x)) << x;
  }
}

}  // namespace
}  // namespace fovea
