// What the tiled CPU kernels promise beyond agreeing with the oracle (which is `fovea check`'s business).
#include <fovea/fovea.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/elements.h"
#include "cpu/flash_backend.h"
#include "tests/support.h"

#define FOVEA_ISA of_this_test
#include "cpu/flash/simd.h"

namespace fovea {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();

/// Tensors of a dense problem, random; outputs start as NaN.
struct Attention {
  explicit Attention(const std::string& line, std::uint32_t seed = 1) : problem(parse_problem(line)), random_(seed) {
    const Problem& p = problem;
    const std::vector<std::int64_t> q{p.batch, p.seqlen_q, p.num_q_heads, p.head_dim},
        v{p.batch, p.seqlen_kv, p.num_kv_heads, p.head_dim_v}, k{p.batch, p.seqlen_kv, p.num_kv_heads, p.head_dim},
        o{p.batch, p.seqlen_q, p.num_q_heads, p.head_dim_v};
    in.q = make(p.dtype, q);
    in.k = make(p.dtype, k);
    in.v = make(p.dtype, v);
    dout = make(p.dtype, o);
    out = {.out = make(p.dtype, o, kNan), .lse = statistic({p.batch, p.num_q_heads, p.seqlen_q}, kNan)};
    grads = {.dq = make(p.dtype, q, kNan), .dk = make(p.dtype, k, kNan), .dv = make(p.dtype, v, kNan)};
    if (p.sink) {
      in.sink = statistic({p.num_q_heads});
      grads.dsink = statistic({p.num_q_heads}, kNan);
    }
    if (p.alibi == Alibi::kPerHead) {
      in.alibi_slopes = statistic({p.num_q_heads});
      grads.dalibi_slopes = statistic({p.num_q_heads}, kNan);
    }
    if (p.bias) {
      in.bias = statistic({1, p.num_q_heads, p.seqlen_q, p.seqlen_kv});
      grads.dbias = statistic({1, p.num_q_heads, p.seqlen_q, p.seqlen_kv}, kNan);
    }
  }

  void execute(const PlanOptions& options = {}) {
    plan_forward(problem, {}, options).execute(in, out);
    Inputs inputs = in;
    inputs.out = out.out;
    inputs.lse = out.lse;
    inputs.dout = dout;
    plan_backward(problem, {}, options).execute(inputs, grads);
  }

  /// All results, one after another.
  [[nodiscard]] std::vector<double> results() const {
    std::vector<double> all;
    for (const Tensor& t :
         {out.out, out.lse, grads.dq, grads.dk, grads.dv, grads.dbias, grads.dalibi_slopes, grads.dsink}) {
      const std::vector<double> values = cpu::load_all(t);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }

  [[nodiscard]] static std::int64_t offset(const Tensor& t, std::int64_t i, std::int64_t h, std::int64_t c) {
    return i * t.strides[1] + h * t.strides[2] + c;
  }
  /// Of batch 0.
  [[nodiscard]] static double at(const Tensor& t, std::int64_t i, std::int64_t h, std::int64_t c) {
    return cpu::load(t, offset(t, i, h, c));
  }
  static void put_nan(const Tensor& t, std::int64_t i, std::int64_t h, std::int64_t c) {
    cpu::store(t, offset(t, i, h, c), std::nan(""));
  }

  Problem problem;
  Inputs in;
  Tensor dout;
  Outputs out, grads;

 private:
  Tensor make(DType dtype, const std::vector<std::int64_t>& shape, float fill = 0.0F) {
    Tensor t = Tensor::contiguous(nullptr, dtype, {});
    std::int64_t n = 1;
    for (const std::int64_t extent : shape) t.shape[t.rank++] = extent;
    for (int i = t.rank - 1; i >= 0; --i) {
      t.strides[i] = n;
      n *= t.shape[i];
    }
    t.data = storage_.emplace_back(static_cast<std::size_t>(n)).data();
    std::normal_distribution<float> normal;
    for (std::int64_t x = 0; x < n; ++x) cpu::store(t, x, std::isnan(fill) ? fill : normal(random_));
    return t;
  }
  Tensor statistic(const std::vector<std::int64_t>& shape, float fill = 0.0F) {
    return make(DType::kFloat32, shape, fill);
  }

  std::mt19937 random_;
  std::vector<std::vector<float>> storage_;  // large enough for any dtype
};

TEST(Draws, OfTheInputsTakeThePlaceOfTheProblemsSeed) {
  const std::string line = "fwd fp32 b2 hq2 hkv2 sq40 skv40 d8 dropout=0.4";
  for (const std::string backend : {"", "reference"}) {
    Attention named(line + " seed=7 offset=3"), drawn(line + " seed=1"), other(line);
    drawn.in.dropout_draws = {7, 3};
    for (Attention* each : {&named, &drawn, &other}) each->execute({.backend = backend});
    EXPECT_EQ(named.results(), drawn.results());
    EXPECT_NE(named.results(), other.results());
  }
}

TEST(Masks, ExpandedByStridesOf0AreAsGoodAsWrittenOut) {
  std::mt19937 random(3);
  std::vector<std::uint8_t> keys(70), all;
  for (auto& key : keys) key = random() % 3 != 0;
  for (int row = 0; row < 2 * 4 * 40; ++row) all.insert(all.end(), keys.begin(), keys.end());
  Tensor expanded = Tensor::contiguous(keys.data(), DType::kBool, {2, 4, 40, 70});
  expanded.strides = {0, 0, 0, 1};
  for (const std::string backend : {"", "reference"}) {
    const auto results = [&](const Tensor& mask) {
      Attention a("fwd fp32 b2 hq4 hkv2 sq40 skv70 d16 bias=1hqk");
      AttentionOptions options;
      options.backend = backend;
      options.mask = mask;
      options.bias = a.in.bias;
      attention_forward(a.in.q, a.in.k, a.in.v, options, a.out.out, a.out.lse);
      attention_backward(a.in.q, a.in.k, a.in.v, a.out.out, a.out.lse, a.dout, options,
                         {.dq = a.grads.dq, .dk = a.grads.dk, .dv = a.grads.dv, .dbias = a.grads.dbias});
      return a.results();
    };
    EXPECT_EQ(results(expanded), results(Tensor::contiguous(all.data(), DType::kBool, {2, 4, 40, 70}))) << backend;
  }
}

/// An instruction set, and the dtype of what it is given: bf16 is multiplied otherwise where it can be.
using IsaAndDType = std::tuple<std::string, std::string>;
class EveryIsa : public ::testing::TestWithParam<IsaAndDType> {
 protected:
  [[nodiscard]] static std::string backend() { return "cpu_" + std::get<0>(GetParam()); }
  [[nodiscard]] static std::string line(const std::string& pass, const std::string& rest) {
    return pass + " " + std::get<1>(GetParam()) + " " + rest;
  }
};
INSTANTIATE_TEST_SUITE_P(Flash, EveryIsa,
                         ::testing::Combine(::testing::ValuesIn(cpu::available_isas()),
                                            ::testing::Values("fp32", "bf16", "fp16")),
                         [](const auto& info) { return std::get<0>(info.param) + "_" + std::get<1>(info.param); });

TEST_P(EveryIsa, GivesTheSameBitsOnAnyNumberOfThreads) {
  for (const char* rest :
       {"b2 hq6 hkv2 sq300 skv410 d40 dv24 causal=bottom_right bias=1hqk:fp32 alibi sink dropout=0.2 softcap=5",
        "b1 hq4 hkv1 sq3 skv3000 d64", "b1 hq4 hkv2 sq3 skv5000 d64", "b1 hq1 sq1500 d16 window=100,0",
        "b1 hq1 sq1024 d64 window=100,- bias=1hqk:fp32", "b1 hq2 sq900 d32 window=70,200 bias=1hqk:fp32"}) {
    Attention one(line("fwd+bwd", rest)), many(line("fwd+bwd", rest));
    one.execute({.backend = backend(), .num_threads = 1});
    many.execute({.backend = backend(), .num_threads = 7});
    const std::vector<double> a = one.results(), b = many.results();
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(double)), 0) << rest;
    for (const double x : a) ASSERT_FALSE(std::isnan(x)) << rest;
  }
}

TEST_P(EveryIsa, AVisibleNanReachesWhatSeesItAndNothingElse) {
  Attention run(line("fwd+bwd", "b1 hq2 hkv1 sq120 d24 causal=top_left"));
  constexpr std::int64_t kBad = 70;  // key 70 is seen by the queries from 70 on
  Attention::put_nan(run.in.v, kBad, 0, 3);
  run.execute({.backend = backend()});
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t i = 0; i < 120; ++i) {
      for (std::int64_t c = 0; c < 24; ++c) {
        EXPECT_EQ(std::isnan(Attention::at(run.out.out, i, h, c)), i >= kBad && c == 3) << i << " " << c;
        EXPECT_EQ(std::isnan(Attention::at(run.grads.dq, i, h, c)), i >= kBad) << i << " " << c;
      }
    }
  }
}

TEST_P(EveryIsa, AHiddenNanChangesNoBit) {
  Attention clean(line("fwd", "b1 hq1 sq512 d64 causal=top_left")),
      run(line("fwd", "b1 hq1 sq512 d64 causal=top_left"));
  constexpr std::int64_t kBad = 400;
  Attention::put_nan(run.in.v, kBad, 0, 3);
  for (Attention* each : {&clean, &run}) each->execute({.backend = backend()});
  for (std::int64_t i = 0; i < kBad; ++i) {
    EXPECT_EQ(cpu::load(run.out.lse, i), cpu::load(clean.out.lse, i)) << i;
    for (std::int64_t c = 0; c < 64; ++c)
      EXPECT_EQ(Attention::at(run.out.out, i, 0, c), Attention::at(clean.out.out, i, 0, c)) << i << " " << c;
  }
}

// Few rows are answered from keys and values where they lie, but for tiles with one that is not finite.
TEST_P(EveryIsa, AHiddenNanTouchesNoneOfAFewQueries) {
  for (const char* heads : {"hq1 sq2 skv480", "hq3 hkv1 sq2 skv480", "hq8 hkv1 sq2 skv480", "hq4 hkv2 sq2 skv4800"}) {
    const std::string problem = line("fwd", std::string("b1 ") + heads + " d64 causal=bottom_right window=200,-");
    Attention run(problem), clean(problem);
    const std::int64_t keys = run.problem.seqlen_kv, group = run.problem.num_q_heads / run.problem.num_kv_heads;
    Attention::put_nan(run.in.v, keys - 205, 0, 5);  // before the window, in a tile of which the rest is seen
    Attention::put_nan(run.in.v, keys - 1, 0, 3);    // seen by the last query alone
    plan_forward(run.problem, {}, {.backend = backend()}).execute(run.in, run.out);
    plan_forward(clean.problem, {}, {.backend = backend()}).execute(clean.in, clean.out);
    for (std::int64_t h = 0; h < run.problem.num_q_heads; ++h) {
      for (std::int64_t i = 0; i < 2; ++i) {
        for (std::int64_t c = 0; c < 64; ++c) {
          const double out = Attention::at(run.out.out, i, h, c), wanted = Attention::at(clean.out.out, i, h, c);
          const bool hit = c == 3 && i == 1 && h < group;
          // A key taken twice would move a result by several hundredths of itself.
          EXPECT_TRUE(hit ? std::isnan(out) : std::abs(out - wanted) < 0.01 * std::abs(wanted) + 3e-4)
              << problem << " " << i << " " << c;
        }
      }
    }
  }
}

TEST_P(EveryIsa, ANanInAQueryStaysInItsRowAndTheKeysItSees) {
  Attention run(line("fwd+bwd", "b1 hq2 hkv1 sq120 d24 causal=top_left"));
  constexpr std::int64_t kBad = 50;  // query 50 of head 1 sees the keys to 50
  Attention::put_nan(run.in.q, kBad, 1, 5);
  run.execute({.backend = backend()});
  for (std::int64_t i = 0; i < 120; ++i) {
    EXPECT_FALSE(std::isnan(Attention::at(run.out.out, i, 0, 0))) << i;
    EXPECT_EQ(std::isnan(Attention::at(run.out.out, i, 1, 0)), i == kBad) << i;
    EXPECT_EQ(std::isnan(Attention::at(run.grads.dq, i, 1, 0)), i == kBad) << i;
    EXPECT_EQ(std::isnan(Attention::at(run.grads.dk, i, 0, 0)), i <= kBad) << i;
    EXPECT_EQ(std::isnan(Attention::at(run.grads.dv, i, 0, 0)), i <= kBad) << i;
  }
}

// Beside a NaN a score of −inf may pass for a hidden one, but nothing else does.
TEST_P(EveryIsa, ARowOfNanReachesEveryKeyButThoseOfScoresOfMinusInfinity) {
  for (const char* rest : {"b1 hq1 sq1 skv3 d24", "b1 hq1 sq1 skv3 d24 bias=1hqk:fp32"}) {
    Attention run(line("fwd+bwd", rest));
    cpu::store(run.in.q, Attention::offset(run.in.q, 0, 0, 5), 1.0);
    cpu::store(run.in.k, Attention::offset(run.in.k, 0, 0, 5), -HUGE_VAL);
    Attention::put_nan(run.in.k, 1, 0, 5);
    run.execute({.backend = backend()});
    for (const Tensor* t : {&run.out.out, &run.grads.dq}) EXPECT_TRUE(std::isnan(Attention::at(*t, 0, 0, 0)));
    for (const Tensor* t : {&run.grads.dk, &run.grads.dv}) {
      EXPECT_TRUE(std::isnan(Attention::at(*t, 2, 0, 0)));
      const double beside = Attention::at(*t, 0, 0, 0);
      EXPECT_TRUE(beside == 0 || std::isnan(beside)) << beside;
    }
  }
}

// Few rows read values where they lie, and otherwise once one is not finite: to the bit alike for rows that do not see
// it.
TEST_P(EveryIsa, ANanThatARowDoesNotSeeChangesNoBitOfIt) {
  for (const char* rest : {"b1 hq8 hkv1 sq2 skv300 d64", "b1 hq1 sq5 skv130 d128", "b1 hq4 hkv2 sq3 skv97 d40 dv72",
                           "b1 hq2 sq40 skv200 d64"}) {
    Attention clean(line("fwd", std::string(rest) + " causal=bottom_right")),
        tainted(line("fwd", std::string(rest) + " causal=bottom_right"));
    const std::int64_t last = clean.problem.seqlen_kv - 1, rows = clean.problem.seqlen_q - 1;  // that do not see it
    for (std::int64_t h = 0; h < clean.problem.num_kv_heads; ++h) Attention::put_nan(tainted.in.v, last, h, 3);
    for (Attention* each : {&clean, &tainted})
      plan_forward(each->problem, {}, {.backend = backend()}).execute(each->in, each->out);
    for (std::int64_t h = 0; h < clean.problem.num_q_heads; ++h) {
      EXPECT_TRUE(std::isnan(Attention::at(tainted.out.out, rows, h, 3))) << rest;
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t c = 0; c < clean.problem.head_dim_v; ++c)
          ASSERT_EQ(Attention::at(clean.out.out, i, h, c), Attention::at(tainted.out.out, i, h, c)) << rest << " " << i;
      }
      for (std::int64_t c = 0; c < clean.problem.head_dim_v; ++c) {
        if (c == 3) continue;
        EXPECT_NEAR(Attention::at(clean.out.out, rows, h, c), Attention::at(tainted.out.out, rows, h, c), 0.02) << c;
      }
    }
    EXPECT_EQ(cpu::load_all(clean.out.lse), cpu::load_all(tainted.out.lse)) << rest;
  }
}

// What is expanded by strides of 0 is read as its copies would be.
TEST_P(EveryIsa, ReadsExpandedInputsAsTheirCopies) {
  for (const int axis : {0, 1, 2}) {
    const std::string problem = line("fwd+bwd", "b2 hq2 sq50 d24 causal=top_left");
    Attention expanded(problem), copied(problem);
    for (Attention* each : {&expanded, &copied}) {
      for (Tensor* t : {&each->in.q, &each->in.k, &each->in.v, &each->dout}) {
        Tensor repeated = *t;
        repeated.strides[axis] = 0;
        for (std::int64_t x = 0; x < cpu::element_count(*t); ++x) {
          std::int64_t from = 0;
          for (int a = 0; a < 4; ++a) from += x / t->strides[a] % t->shape[a] * repeated.strides[a];
          cpu::store(*t, x, cpu::load(*t, from));
        }
        if (each == &expanded) *t = repeated;
      }
      each->execute({.backend = backend()});
    }
    EXPECT_EQ(expanded.results(), copied.results()) << axis;
  }
}

// A score of −inf has weight 0, and a row with no other has nothing to share out; NaN is another matter.
TEST_P(EveryIsa, ARowOfInfinitelyLowScoresGivesZero) {
  for (const char* rest : {"b1 hq2 hkv1 sq40 skv300 d24 alibi", "b1 hq2 hkv1 sq40 skv300 d24 causal=bottom_right sink",
                           "b1 hq2 hkv1 sq2 skv3000 d64", "b1 hq2 hkv1 sq2 skv3000 d64 sink dropout=0.3"}) {
    Attention run(line("fwd", rest)), exact(line("fwd", rest));
    for (Attention* each : {&run, &exact}) {
      const Inputs& in = each->in;
      for (std::int64_t j = 0; j < each->problem.seqlen_kv; ++j)
        cpu::store(in.k, Attention::offset(in.k, j, 0, 5), -0.25 - std::abs(Attention::at(in.k, j, 0, 5)));
      cpu::store(in.q, Attention::offset(in.q, 1, 1, 5), HUGE_VAL);   // every score −inf
      cpu::store(in.q, Attention::offset(in.q, 0, 1, 5), -HUGE_VAL);  // every score +inf
      cpu::store(in.k, Attention::offset(in.k, 7, 0, 2), -HUGE_VAL);  // −inf or +inf, as q's sign has it
      cpu::store(in.q, Attention::offset(in.q, 1, 1, 2), 0.5);
    }
    plan_forward(run.problem, {}, {.backend = backend()}).execute(run.in, run.out);
    plan_forward(exact.problem, {}, {.backend = "reference"}).execute(exact.in, exact.out);
    EXPECT_EQ(cpu::load(exact.out.lse, exact.problem.seqlen_q + 1), -kInfinity);
    int finite = 0, zeros = 0, nans = 0;
    for (const Tensor Outputs::*t : {&Outputs::out, &Outputs::lse}) {
      const std::vector<double> got = cpu::load_all(run.out.*t), wanted = cpu::load_all(exact.out.*t);
      for (std::size_t x = 0; x < got.size(); ++x) {
        if (std::isnan(wanted[x])) {
          ++nans;
          EXPECT_FALSE(std::isfinite(got[x])) << rest << " " << x;
        } else if (wanted[x] == 0 || std::isinf(wanted[x])) {
          ++zeros;
          EXPECT_EQ(got[x], wanted[x]) << rest << " " << x;
        } else {
          ++finite;
          EXPECT_NEAR(got[x], wanted[x], 0.01 * std::abs(wanted[x]) + 0.03) << rest << " " << x;
        }
      }
    }
    EXPECT_TRUE(finite > 20 && zeros > 20 && nans > 20) << finite << " " << zeros << " " << nans;
  }
}

TEST_P(EveryIsa, TouchesOnlyTensorsOfItsOwnPass) {
  const std::string both = line("fwd+bwd", "b1 hq2 sq30 d8");
  Attention alone(both), mixed(both), unused(line("fwd", "b1 hq2 sq30 d8"));
  const PlanOptions options{.backend = backend()};
  alone.execute(options);
  mixed.in.lse = unused.out.lse;  // of a backward pass, and so none of the forward pass's business
  plan_forward(mixed.problem, {}, options).execute(mixed.in, {.out = mixed.out.out});
  EXPECT_TRUE(std::isnan(cpu::load(unused.out.lse, 0)));

  mixed.in.out = alone.out.out;
  mixed.in.lse = alone.out.lse;
  mixed.in.dout = mixed.dout;
  mixed.grads.out = unused.out.out;  // NaN, and an output
  mixed.grads.lse = unused.out.lse;
  plan_backward(mixed.problem, {}, options).execute(mixed.in, mixed.grads);
  EXPECT_EQ(cpu::load_all(mixed.grads.dq), cpu::load_all(alone.grads.dq));
}

// What a row's largest score is measured from moves only when it must: a late key that towers over the others, by less
// and by more than that takes, one that leaves them all behind, and one by so much that a unit in its last place is
// thousands.
TEST_P(EveryIsa, ALateGreatScoreTakesOver) {
  for (const auto& [size, scale] : {std::pair{4.0, 1.0}, {40.0, 1.0}, {400.0, 1.0}, {3.0, 0x1p35}}) {
    Attention run(line("fwd", "b1 hq1 sq60 skv700 d16 scale=" + std::to_string(scale)));
    for (std::int64_t c = 0; c < 16; ++c) {
      for (std::int64_t i = 0; i < 60; ++i) cpu::store(run.in.q, Attention::offset(run.in.q, i, 0, c), c == 0 ? 1 : 0);
      for (std::int64_t j = 0; j < 700; ++j) {
        const double score = j == 300 ? size : j == 650 ? 2 * size : 0;
        cpu::store(run.in.k, Attention::offset(run.in.k, j, 0, c), c == 0 ? score : 0);
      }
    }
    plan_forward(run.problem, {}, {.backend = backend()}).execute(run.in, run.out);
    const double top = 2 * size * scale, sum = 1 + std::exp(-top / 2) + 698 * std::exp(-top);
    for (std::int64_t i = 0; i < 60; ++i) {
      EXPECT_NEAR(cpu::load(run.out.lse, i), top + std::log(sum), 2e-7 * (10 + top)) << size;
      for (std::int64_t c = 0; c < 16; ++c) {
        double expected = 0;
        for (std::int64_t j = 0; j < 700; ++j) {
          const double score = j == 300 ? size : j == 650 ? 2 * size : 0;
          expected += std::exp(score * scale - top) / sum * Attention::at(run.in.v, j, 0, c);
        }
        EXPECT_NEAR(Attention::at(run.out.out, i, 0, c), expected, 0.02) << size << " " << i << " " << c;
      }
    }
  }
}

TEST_P(EveryIsa, WritesTheBiasGradientPastTheLongestSequence) {
  constexpr std::int64_t kTotal = 70, kBound = 60;  // sequences of 30 and 40 where 60 would have been allowed
  std::vector<float> rows(kTotal), lse(kTotal), bias(kBound * kBound), dbias(bias.size(), kNan), dq(kTotal), dk(kTotal),
      dv(kTotal);
  const std::vector<std::int32_t> ends{0, 30, kTotal};
  const auto view = [](const auto& values, std::initializer_list<std::int64_t> shape) {
    return Tensor::contiguous(values.data(), DType::kFloat32, shape);
  };
  const Tensor row = view(rows, {kTotal, 1, 1});
  const Tensor cu_seqlens = Tensor::contiguous(ends.data(), DType::kInt32, {3});
  const Problem problem = parse_problem("bwd fp32 b2 hq1 sq60 d1 packed=random:70 bias=11qk");
  plan_backward(problem, {}, {.backend = backend()})
      .execute({.q = row,
                .k = row,
                .v = row,
                .bias = view(bias, {1, 1, kBound, kBound}),
                .cu_seqlens_q = cu_seqlens,
                .cu_seqlens_kv = cu_seqlens,
                .out = row,
                .lse = view(lse, {1, kTotal}),
                .dout = row},
               {.dq = view(dq, {kTotal, 1, 1}),
                .dk = view(dk, {kTotal, 1, 1}),
                .dv = view(dv, {kTotal, 1, 1}),
                .dbias = view(dbias, {1, 1, kBound, kBound})});
  for (std::size_t i = 0; i < dbias.size(); ++i) ASSERT_EQ(dbias[i], 0.0F) << i;
}

class Exp2 : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Flash, Exp2, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return info.param; });

// Every 509th float of the range; every one with FOVEA_EXHAUSTIVE set, which takes a minute.
TEST_P(Exp2, IsOffByLessThanTwoToMinus22OfItself) {
  const auto exp2 = cpu::flash_kernels(GetParam()).exp2;
  const std::uint32_t step = std::getenv("FOVEA_EXHAUSTIVE") == nullptr ? 509 : 1;
  constexpr std::size_t kCount = 4096;
  std::vector<float> x, y;
  double worst = 0.0;
  const auto flush = [&] {
    x.resize((x.size() + 15) / 16 * 16);  // a whole number of vectors
    y = x;
    exp2(y.data(), static_cast<std::int64_t>(y.size()));
    for (std::size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp2(static_cast<double>(x[i]));
      worst = test::worse(worst, std::abs(static_cast<double>(y[i]) - exact) / exact);
    }
    x.clear();
  };
  const std::uint32_t first = std::random_device{}() % step;
  for (const float end : {-126.0F, 126.0F}) {  // from 0 to it, by the bits of floats
    for (std::uint32_t bits = std::bit_cast<std::uint32_t>(std::copysign(0.0F, end)) + first;
         bits <= std::bit_cast<std::uint32_t>(end); bits += step) {
      x.push_back(std::bit_cast<float>(bits));
      if (x.size() == kCount) flush();
    }
    flush();
  }
  EXPECT_LT(worst, 0x1p-22);
}

TEST_P(Exp2, IsExactWhereItMustBe) {
  std::vector<float> x{0.0F, -0.0F, -1.0F, 1.0F, -126.0F, -126.5F, -1e4F, -1e38F, -kInfinity, kNan};
  x.resize(16);
  cpu::flash_kernels(GetParam()).exp2(x.data(), 16);
  const std::vector<float> wanted{1.0F, 1.0F, 0.5F, 2.0F, 0x1p-126F, 0.0F, 0.0F, 0.0F, 0.0F};
  for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_EQ(x[i], wanted[i]) << i;
  EXPECT_TRUE(std::isnan(x[9]));
}

TEST(Tanh, IsWithinFiveUnitsInTheLastPlace) {
  using namespace cpu::of_this_test;
  double worst = 0.0;
  constexpr int kSteps = 3 << 20;
  for (int i = 0; i < kSteps; ++i) {
    const float x = -20.0F + 40.0F / kSteps * static_cast<float>(i);
    const double exact = std::tanh(static_cast<double>(x));
    const double size = std::max(std::abs(exact), 0x1p-126);  // tanh(0) is 0, or infinitely wrong
    worst = test::worse(worst, std::abs(static_cast<double>(tanh(splat(x))[0]) - exact) / size);
  }
  EXPECT_LT(worst, 5 * 0x1p-24);
  EXPECT_EQ(tanh(splat(cpu::of_this_test::kInfinity))[0], 1.0F);
  EXPECT_TRUE(std::isnan(tanh(splat(kNan))[0]));
}

}  // namespace
}  // namespace fovea
