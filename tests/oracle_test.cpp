#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>

#include "cpu/elements.h"
#include "cpu/reference.h"
#include "math/float16.h"
#include "tools/random.h"
#include "tools/workload.h"

// The oracle against what is known without it: published vectors, numbers worked out by hand, finite differences, and
// the promises of the contract that relate one problem to another.
namespace fovea {
namespace {

using cpu::Operands;
using cpu::Results;
using tools::Data;
using tools::Workload;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

/// Operands of a problem line, finite wherever they are visible.
Operands operands_of(const std::string& line, std::uint64_t seed = 1) {
  const Problem problem = parse_problem(line);
  while (true) {
    const Workload work(problem, seed++, Data::kHostile);
    const std::vector<double>& out = work.exact().out;
    if (std::all_of(out.begin(), out.end(), [](double x) { return std::isfinite(x); })) return work.operands();
  }
}

/// A one-head forward problem with all values given.
Operands single_head(const std::string& options, std::vector<double> q, std::vector<double> k, std::vector<double> v) {
  Problem p;
  p.direction = Direction::kForward;
  p.head_dim = p.head_dim_v = 1;
  p.seqlen_q = std::ssize(q);
  p.seqlen_kv = std::ssize(k);
  p.softmax_scale = 1.0F;
  parse_options(options, p);
  Operands x(p, {});
  x.q = std::move(q);
  x.k = std::move(k);
  x.v = std::move(v);
  return x;
}

// ---------------------------------------------------------------------------------------------------- dropout bits

TEST(Philox, GivesThePublishedNumbers) {  // kat_vectors of Random123
  using Four = std::array<std::uint32_t, 4>;
  using Two = std::array<std::uint32_t, 2>;
  constexpr std::uint32_t kOnes = 0xffffffff;
  EXPECT_EQ(cpu::philox4x32_10({0, 0, 0, 0}, {0, 0}), (Four{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(cpu::philox4x32_10({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (Four{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(cpu::philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Four{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
  EXPECT_EQ(cpu::philox2x32_7({0, 0}, 0), (Two{0x257a3673, 0xcd26be2a}));
  EXPECT_EQ(cpu::philox2x32_7({kOnes, kOnes}, kOnes), (Two{0xab302c4d, 0x3dc9d239}));
  EXPECT_EQ(cpu::philox2x32_7({0x243f6a88, 0x85a308d3}, 0x13198a2e), (Two{0xbedbbe6b, 0xe4c770b3}));
}

TEST(Dropout, TakesTheBitsTheContractNames) {
  const Operands x =
      operands_of("fwd fp32 b2 hq3 sq70 skv90 d1 dropout=0.4 seed=11400714819323198485 offset=81985529216486895");
  const std::uint64_t seed = x.problem.dropout.seed, offset = x.problem.dropout.offset;
  const auto low = [](std::uint64_t n) { return static_cast<std::uint32_t>(n & 0xffffffff); };
  const auto high = [](std::uint64_t n) { return static_cast<std::uint32_t>(n >> 32); };
  const double kept = std::round((1.0 - static_cast<double>(0.4F)) * 65536.0);
  for (const auto& [b, h] : {std::pair{0, 0}, {0, 2}, {1, 1}}) {
    const auto s = cpu::philox4x32_10({static_cast<std::uint32_t>(b * 3 + h), 0, low(offset), high(offset)},
                                      {low(seed), high(seed)});
    // One call draws for {r, r + 8} × {c, c + 8} of a 16 × 16 tile.
    for (const auto [tile_i, tile_j, r, c] : {std::array{0, 0, 0, 0}, {1, 0, 3, 5}, {3, 4, 7, 2}, {2, 5, 0, 1}}) {
      const auto words = cpu::philox2x32_7(
          {s[1] ^ static_cast<std::uint32_t>(tile_i * 8 + r), s[2] ^ static_cast<std::uint32_t>(tile_j * 8 + c)}, s[0]);
      for (const int half_i : {0, 1}) {
        for (const int half_j : {0, 1}) {
          const std::uint32_t draw = half_j == 0 ? words[half_i] & 0xffff : words[half_i] >> 16;
          const double wanted = draw < kept ? 65536.0 / kept : 0.0;
          EXPECT_EQ(x.dropout(b, h, tile_i * 16 + r + half_i * 8, tile_j * 16 + c + half_j * 8), wanted);
        }
      }
    }
  }
}

TEST(Dropout, KeepsTheShareItPromises) {
  const Operands x = operands_of("fwd fp32 b1 hq2 sq200 skv300 d1 dropout=0.3 seed=5");
  const double kept = std::round((1.0 - static_cast<double>(0.3F)) * 65536.0) / 65536.0;
  double share = 0.0;
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < 200; ++i) {
      for (int j = 0; j < 300; ++j) share += x.dropout(0, h, i, j) > 0.0 ? 1.0 / 120000.0 : 0.0;
    }
  }
  EXPECT_NEAR(share, kept, 4.0 * std::sqrt(kept * (1.0 - kept) / 120000.0));
}

// ------------------------------------------------------------------------------------------------ numbers by hand

TEST(Softmax, GivesTheNumbersWorkedOutByHand) {
  // Logits log 1, log 2, log 5: weights 1/8, 2/8, 5/8.
  const Operands x = single_head("", {1.0}, {0.0, std::log(2.0), std::log(5.0)}, {8.0, 16.0, -8.0});
  const Results r = cpu::reference(x);
  EXPECT_NEAR(r.out[0], 1.0 + 4.0 - 5.0, 1e-14);
  EXPECT_NEAR(r.lse[0], std::log(8.0), 1e-14);
}

TEST(Sink, IsOneMoreLogitWithoutAValue) {
  Operands x = single_head("", {1.0}, {0.0, std::log(2.0), std::log(5.0)}, {8.0, 16.0, -8.0});
  x.problem.sink = true;
  x.sink = {std::log(8.0)};
  const Results r = cpu::reference(x);
  EXPECT_NEAR(r.out[0], (1.0 + 4.0 - 5.0) / 2.0, 1e-14);
  EXPECT_NEAR(r.lse[0], std::log(16.0), 1e-14);
}

TEST(Scores, ApplyScaleThenSoftcapThenAlibiAndBias) {
  Operands x =
      single_head("softcap=2 scale=0.5 alibi causal=bottom_right", {3.0, 3.0}, {1.0, -2.0, 4.0}, {1.0, 10.0, 100.0});
  x.alibi_slopes = {0.25};
  x.bias = {true, {0.5, -1.0, 2.0}, {0, 0, 0, 1}};
  const auto logit = [&](int i, int j) {
    const double s = 3.0 * std::array{1.0, -2.0, 4.0}[j] * 0.5;
    return 2.0 * std::tanh(s / 2.0) - 0.25 * std::abs(i + 1 - j) + std::array{0.5, -1.0, 2.0}[j];
  };
  const Results r = cpu::reference(x);
  for (const int i : {0, 1}) {
    double sum = 0.0, out = 0.0;
    for (int j = 0; j <= i + 1; ++j) {
      sum += std::exp(logit(i, j));
      out += std::exp(logit(i, j)) * std::pow(10.0, j);
    }
    EXPECT_NEAR(r.out[i], out / sum, 1e-12);
    EXPECT_NEAR(r.lse[i], std::log(sum), 1e-14);
  }
}

TEST(Alibi, TakesTheSlopeOfItsBatchAndHead) {
  for (const bool per_batch : {false, true}) {
    Operands x = operands_of(std::string("fwd fp32 b2 hq3 sq4 skv6 d1 ") + (per_batch ? "alibi=b" : "alibi"));
    std::fill(x.q.begin(), x.q.end(), 0.0);
    const Results r = cpu::reference(x);
    for (int b = 0; b < 2; ++b) {
      for (int h = 0; h < 3; ++h) {
        for (int i = 0; i < 4; ++i) {
          double sum = 0.0;  // the diagonal is the bottom right one: through key i + 2
          for (int j = 0; j < 6; ++j) sum += std::exp(-x.alibi_slopes[per_batch ? b * 3 + h : h] * std::abs(i + 2 - j));
          EXPECT_NEAR(r.lse[x.lse_at(b, h, i)], std::log(sum), 1e-14);
        }
      }
    }
  }
}

/// Which keys each row sees: "x" visible, "." hidden.
std::vector<std::string> picture(const Operands& x, std::int64_t b = 0) {
  std::vector<std::string> rows;
  for (std::int64_t i = 0; i < x.sequences[b].slot_q; ++i) {
    std::string row;
    for (std::int64_t j = 0; j < x.sequences[b].slot_kv; ++j) row += x.visible(b, 0, i, j) ? 'x' : '.';
    rows.push_back(row);
  }
  return rows;
}
using Picture = std::vector<std::string>;

TEST(Band, RunsThroughTheCornerThatIsNamed) {
  const auto seen = [](const char* options) {
    return picture(operands_of(std::string("fwd fp32 b1 hq1 d1 ") + options));
  };
  EXPECT_EQ(seen("sq3 skv5 causal=top_left"), (Picture{"x....", "xx...", "xxx.."}));
  EXPECT_EQ(seen("sq3 skv5 causal=bottom_right"), (Picture{"xxx..", "xxxx.", "xxxxx"}));
  EXPECT_EQ(seen("sq5 skv3 causal=bottom_right"), (Picture{"...", "...", "x..", "xx.", "xxx"}));
  EXPECT_EQ(seen("sq3 skv5 window=1,0"), (Picture{".xx..", "..xx.", "...xx"}));
  EXPECT_EQ(seen("sq3 skv5 window=0,1 causal=top_left"), (Picture{"x....", ".x...", "..x.."}));
  EXPECT_EQ(seen("sq3 skv5 window=-,1"), (Picture{"xxxx.", "xxxxx", "xxxxx"}));
}

TEST(Band, TakesItsCornerFromTheTrueLengths) {
  const auto seen = [](const char* options) {
    return picture(operands_of(std::string("fwd fp32 b1 hq1 sq4 skv6 d1 ") + options));
  };
  EXPECT_EQ(seen("kvlen=4 causal=bottom_right"), (Picture{"x.....", "xx....", "xxx...", "xxxx.."}));
  EXPECT_EQ(seen("qlen=2 kvlen=4 causal=bottom_right"), (Picture{"xxx...", "xxxx..", "......", "......"}));
  EXPECT_EQ(seen("qlen=2 kvlen=4 causal=top_left"), (Picture{"x.....", "xx....", "......", "......"}));
  EXPECT_EQ(seen("kvlen=0"), (Picture{"......", "......", "......", "......"}));
}

TEST(Mask, KeepsWhatIsTrue) {
  Operands x = single_head("", {1.0}, {0.0, 0.0, 0.0}, {1.0, 2.0, 4.0});
  x.mask = {true, {1.0, 0.0, 1.0}, {0, 0, 0, 1}};
  EXPECT_NEAR(cpu::reference(x).out[0], 2.5, 1e-14);
}

// ------------------------------------------------------------------------------------------------------- promises

TEST(EmptyRow, GivesZeroOutAndMinusInfinityLse) {
  for (const char* options : {"sq5 skv3 causal=bottom_right", "sq4 skv0", "sq4 skv6 kvlen=0,2 sink",
                              "sq4 skv6 mask=b11k sink", "sq4 skv5 qlen=2,0 bias=bhqk"}) {
    Operands x = operands_of(std::string("fwd+bwd fp32 b2 hq2 d3 ") + options);
    std::fill(x.mask.values.begin(), x.mask.values.end(), 0.0);
    const Results r = cpu::reference(x);
    int empty = 0;
    for (int b = 0; b < 2; ++b) {
      for (int h = 0; h < 2; ++h) {
        for (int i = 0; i < x.problem.seqlen_q; ++i) {
          bool sees = false;
          for (int j = 0; j < x.problem.seqlen_kv; ++j) sees = sees || x.visible(b, h, i, j);
          if (sees) continue;
          ++empty;
          EXPECT_EQ(r.lse[x.lse_at(b, h, i)], -kInfinity) << options;
          for (int c = 0; c < 3; ++c) {
            EXPECT_EQ(r.out[x.q_row(b, h, i) * 3 + c], 0.0) << options;
            EXPECT_EQ(r.dq[x.q_row(b, h, i) * 3 + c], 0.0) << options;
          }
        }
      }
    }
    EXPECT_GT(empty, 0) << options;
  }
}

TEST(HiddenValues, NeverTouchAResult) {
  const std::string line =
      "fwd+bwd fp32 b2 hq4 hkv2 sq9 skv12 d3 dv2 causal=bottom_right qlen=9,4 kvlen=5,12 mask=1hqk bias=b1qk sink";
  const Operands poisoned = operands_of(line);
  Operands clean = poisoned;
  int replaced = 0;
  for (std::vector<double>* values : {&clean.q, &clean.k, &clean.v, &clean.dout, &clean.dlse, &clean.bias.values}) {
    for (double& x : *values) {
      if (std::isnan(x)) x = 0.5, ++replaced;
    }
  }
  ASSERT_GT(replaced, 50);
  const Results a = cpu::reference(poisoned), b = cpu::reference(clean);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.lse, b.lse);
  EXPECT_EQ(a.dq, b.dq);
  EXPECT_EQ(a.dk, b.dk);
  EXPECT_EQ(a.dv, b.dv);
  EXPECT_EQ(a.dbias, b.dbias);
  EXPECT_EQ(a.dsink, b.dsink);
}

TEST(VisibleNaN, IsNotSwallowedAndReachesNoRowThatDoesNotSeeIt) {
  Operands x = operands_of("fwd fp32 b1 hq1 sq6 skv6 d2 causal=top_left dropout=0.5");
  x.v[3 * 2 + 1] = kNaN;  // of key 3
  const Results r = cpu::reference(x);
  for (int i = 0; i < 6; ++i) {
    EXPECT_FALSE(std::isnan(r.out[i * 2])) << i;
    EXPECT_EQ(std::isnan(r.out[i * 2 + 1]), i >= 3) << i;  // dropped or not: 0·NaN is NaN
  }
}

TEST(Gqa, GivesEachGroupItsOwnKeys) {
  const Operands grouped = operands_of("fwd+bwd fp32 b2 hq6 hkv2 sq5 skv7 d3 dv2");
  Operands repeated = grouped;
  repeated.problem.num_kv_heads = 6;
  const auto repeat = [&](const std::vector<double>& of, std::int64_t dim) {
    std::vector<double> all;
    for (std::int64_t row = 0; row < std::ssize(of) / dim; ++row) {
      for (int copy = 0; copy < 3; ++copy) all.insert(all.end(), of.begin() + row * dim, of.begin() + (row + 1) * dim);
    }
    return all;
  };
  repeated.k = repeat(grouped.k, 3);
  repeated.v = repeat(grouped.v, 2);
  const Results a = cpu::reference(grouped), b = cpu::reference(repeated);
  EXPECT_EQ(a.out, b.out);
  EXPECT_EQ(a.dq, b.dq);
  for (std::size_t row = 0; row < a.dk.size() / 3; ++row) {  // gradients of a group add up
    for (std::size_t c = 0; c < 3; ++c) {
      double sum = 0.0;
      for (std::size_t copy = 0; copy < 3; ++copy) sum += b.dk[(row * 3 + copy) * 3 + c];
      EXPECT_NEAR(a.dk[row * 3 + c], sum, 1e-12);
    }
  }
}

TEST(Packed, IsTheSameAsPadded) {
  const std::string options =
      " hq4 hkv2 d3 causal=bottom_right window=4,- bias=bhqk alibi=b sink softcap=3 dropout=0.3 seed=9";
  const Operands padded = operands_of("fwd+bwd fp32 b3 sq9 skv8 qlen=4,9,0 kvlen=8,3,5" + options);
  Operands packed = operands_of("fwd+bwd fp32 packed_q=4+9+0 packed_kv=8+3+5" + options);
  const auto copy_rows = [&](const std::vector<double>& from, std::vector<double>& to, bool query, std::int64_t heads) {
    const std::int64_t width = 3 * heads;
    for (int b = 0; b < 3; ++b) {
      const cpu::SequenceRows &a = padded.sequences[b], &z = packed.sequences[b];
      const std::int64_t first = query ? a.first_q : a.first_kv, to_first = query ? z.first_q : z.first_kv;
      const std::int64_t count = query ? z.slot_q : z.slot_kv;
      std::copy_n(from.begin() + first * width, count * width, to.begin() + to_first * width);
    }
  };
  copy_rows(padded.q, packed.q, true, 4);
  copy_rows(padded.dout, packed.dout, true, 4);
  copy_rows(padded.k, packed.k, false, 2);
  copy_rows(padded.v, packed.v, false, 2);
  packed.bias = padded.bias;
  packed.alibi_slopes = padded.alibi_slopes;
  packed.sink = padded.sink;
  Operands without = padded;
  without.dlse.clear();
  packed.dlse.clear();

  const Results a = cpu::reference(without), z = cpu::reference(packed);
  std::vector<double> out(z.out.size()), dq(z.dq.size()), dk(z.dk.size()), dv(z.dv.size());
  copy_rows(a.out, out, true, 4);
  copy_rows(a.dq, dq, true, 4);
  copy_rows(a.dk, dk, false, 2);
  copy_rows(a.dv, dv, false, 2);
  EXPECT_EQ(z.out, out);
  EXPECT_EQ(z.dq, dq);
  EXPECT_EQ(z.dk, dk);
  EXPECT_EQ(z.dv, dv);
  EXPECT_EQ(z.dbias, a.dbias);
  EXPECT_EQ(z.dsink, a.dsink);
  for (int h = 0; h < 4; ++h) {
    for (int i = 0; i < 9; ++i) EXPECT_EQ(z.lse[packed.lse_at(1, h, i)], a.lse[padded.lse_at(1, h, i)]);
  }
}

// ------------------------------------------------------------------------------------------------------ gradients

/// What the gradients are of: Σ dout·out + Σ dlse·lse over the rows that see anything.
double loss(Operands x) {
  x.problem.direction = Direction::kForward;
  const Results r = cpu::reference(x);
  const Problem& p = x.problem;
  double sum = 0.0;
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.num_q_heads; ++h) {
      for (std::int64_t i = 0; i < x.sequences[b].len_q; ++i) {
        const std::int64_t lse_at = x.lse_at(b, h, i), row = x.q_row(b, h, i) * p.head_dim_v;
        if (r.lse[lse_at] == -kInfinity) continue;
        if (!x.dlse.empty()) sum += x.dlse[lse_at] * r.lse[lse_at];
        for (std::int64_t c = 0; c < p.head_dim_v; ++c) sum += x.dout[row + c] * r.out[row + c];
      }
    }
  }
  return sum;
}

class Gradients : public testing::TestWithParam<std::string> {};

TEST_P(Gradients, AreThoseOfFiniteDifferences) {
  const Operands x = operands_of(GetParam());
  const Results r = cpu::reference(x);
  const auto compare = [&](const char* name, auto member, const std::vector<double>& gradient) {
    Operands moved = x;
    std::vector<double>& values = member(moved);
    ASSERT_EQ(values.size(), gradient.size()) << name;
    constexpr double kStep = 1e-5;
    int seen = 0;
    for (std::size_t i = 0; i < values.size(); ++i) {
      const double value = values[i];
      if (!std::isfinite(value)) {  // hidden
        EXPECT_EQ(gradient[i], 0.0) << name << " " << i;
        continue;
      }
      values[i] = value + kStep;
      const double above = loss(moved);
      values[i] = value - kStep;
      const double below = loss(moved);
      values[i] = value;
      const double wanted = (above - below) / (2.0 * kStep);
      EXPECT_NEAR(gradient[i], wanted, 1e-7 * (1.0 + std::abs(wanted))) << name << " " << i << ": " << GetParam();
      seen += gradient[i] != 0.0 ? 1 : 0;
    }
    EXPECT_TRUE(seen > 0 || values.empty()) << name;
  };
  compare(
      "q", [](Operands & o) -> auto& { return o.q; }, r.dq);
  compare(
      "k", [](Operands & o) -> auto& { return o.k; }, r.dk);
  compare(
      "v", [](Operands & o) -> auto& { return o.v; }, r.dv);
  compare(
      "bias", [](Operands & o) -> auto& { return o.bias.values; }, r.dbias);
  compare(
      "alibi_slopes", [](Operands & o) -> auto& { return o.alibi_slopes; }, r.dalibi_slopes);
  compare(
      "sink", [](Operands & o) -> auto& { return o.sink; }, r.dsink);
}

INSTANTIATE_TEST_SUITE_P(
    Oracle, Gradients,
    testing::Values(
        "fwd+bwd fp32 b2 hq2 sq5 skv6 d3 dv2",  //
        "fwd+bwd fp32 b2 hq4 hkv2 sq5 skv6 d3 softcap=1.5 sink bias=bhqk alibi",
        "fwd+bwd fp32 b2 hq2 hkv1 sq4 skv6 d2 dv4 causal=bottom_right bias=1h1k alibi=b dropout=0.3 sink",
        "fwd+bwd fp32 b1 hq3 sq6 skv5 d2 causal=top_left window=2,- bias=1111 softcap=0.7 scale=0.9",
        "fwd+bwd fp32 b2 hq2 sq6 skv6 d3 qlen=4,6 kvlen=6,3 mask=11qk bias=b1q1 sink dropout=0.5",
        "fwd+bwd fp32 hq4 hkv2 d2 packed_q=3+0+5 packed_kv=4+2+6 causal=bottom_right bias=bhqk alibi=b sink "
        "softcap=2 dropout=0.2 scale=-0.6",
        "fwd+bwd fp32 b2 hq2 sq5 skv5 d3 mask=bhqk sink layout=qkv_packed"));

// ------------------------------------------------------------------------------------------------------- elements

TEST(Elements, ConvertLikeTheKernelsThoughWrittenApart) {
  std::uint16_t half = 0, bfloat = 0;
  const Tensor h = Tensor::contiguous(&half, DType::kFloat16, {1});
  const Tensor b = Tensor::contiguous(&bfloat, DType::kBFloat16, {1});
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    half = bfloat = static_cast<std::uint16_t>(bits);
    const auto as_half = static_cast<float>(cpu::load(h, 0)), as_bfloat = static_cast<float>(cpu::load(b, 0));
    if (!std::isnan(as_half)) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(as_half), std::bit_cast<std::uint32_t>(math::float_of_half(half)));
    }
    if (!std::isnan(as_bfloat)) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(as_bfloat), std::bit_cast<std::uint32_t>(math::float_of_bf16(bfloat)));
    }
  }
  const tools::Random random(3);
  for (std::uint64_t i = 0; i < 200000; ++i) {
    auto bits = static_cast<std::uint32_t>(random.bits(i));
    if (i % 2 == 1) bits = (bits & 0xff800000) | ((bits & 3) << 22) | ((bits >> 8 & 0xf) << 12);  // halfway cases
    if (i % 4 >= 2) bits = (bits & 0x807fffff) | (100 + (bits >> 23 & 0x1f)) << 23;               // half's exponents
    const auto x = std::bit_cast<float>(bits);
    if (std::isnan(x)) continue;
    cpu::store(h, 0, x);
    cpu::store(b, 0, x);
    ASSERT_EQ(half, math::half_of_float(x)) << x;
    ASSERT_EQ(bfloat, math::bf16_of_float(x)) << x;
  }
}

}  // namespace
}  // namespace fovea
