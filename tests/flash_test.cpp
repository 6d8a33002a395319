// What the tiled CPU kernels promise beyond agreeing with the oracle (which is `fovea check`'s business).
#include <fovea/fovea.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/flash_backend.h"

#define FOVEA_ISA of_this_test
#include "cpu/flash/simd.h"

namespace fovea {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Tensors of a dense fp32 problem, random; outputs start as NaN.
struct Attention {
  explicit Attention(const std::string& line, std::uint32_t seed = 1) : problem(parse_problem(line)), random_(seed) {
    const Problem& p = problem;
    const std::vector<std::int64_t> q{p.batch, p.seqlen_q, p.num_q_heads, p.head_dim},
        v{p.batch, p.seqlen_kv, p.num_kv_heads, p.head_dim_v}, k{p.batch, p.seqlen_kv, p.num_kv_heads, p.head_dim},
        o{p.batch, p.seqlen_q, p.num_q_heads, p.head_dim_v};
    in.q = make(q);
    in.k = make(k);
    in.v = make(v);
    dout = make(o);
    out = {.out = make(o, kNan), .lse = make({p.batch, p.num_q_heads, p.seqlen_q}, kNan)};
    grads = {.dq = make(q, kNan), .dk = make(k, kNan), .dv = make(v, kNan)};
    if (p.sink) {
      in.sink = make({p.num_q_heads});
      grads.dsink = make({p.num_q_heads}, kNan);
    }
    if (p.alibi == Alibi::kPerHead) {
      in.alibi_slopes = make({p.num_q_heads});
      grads.dalibi_slopes = make({p.num_q_heads}, kNan);
    }
    if (p.bias) {
      in.bias = make({1, p.num_q_heads, p.seqlen_q, p.seqlen_kv});
      grads.dbias = make({1, p.num_q_heads, p.seqlen_q, p.seqlen_kv}, kNan);
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
  [[nodiscard]] std::vector<float> results() const {
    std::vector<float> all;
    for (const Tensor& t :
         {out.out, out.lse, grads.dq, grads.dk, grads.dv, grads.dbias, grads.dalibi_slopes, grads.dsink}) {
      const auto* data = static_cast<const float*>(t.data);
      if (t.defined()) all.insert(all.end(), data, data + count(t));
    }
    return all;
  }

  [[nodiscard]] static float* row(const Tensor& t, std::int64_t b, std::int64_t i, std::int64_t h) {
    return static_cast<float*>(t.data) + b * t.strides[0] + i * t.strides[1] + h * t.strides[2];
  }
  [[nodiscard]] static std::int64_t count(const Tensor& t) {
    std::int64_t n = 1;
    for (int i = 0; i < t.rank; ++i) n *= t.shape[i];
    return n;
  }

  Problem problem;
  Inputs in;
  Tensor dout;
  Outputs out, grads;

 private:
  Tensor make(const std::vector<std::int64_t>& shape, float fill = 0.0F) {
    Tensor t = Tensor::contiguous(nullptr, DType::kFloat32, {});
    std::int64_t n = 1;
    for (const std::int64_t extent : shape) t.shape[t.rank++] = extent;
    for (int i = t.rank - 1; i >= 0; --i) {
      t.strides[i] = n;
      n *= t.shape[i];
    }
    auto& values = storage_.emplace_back(static_cast<std::size_t>(n), fill);
    std::normal_distribution<float> normal;
    for (float& x : values) x = std::isnan(fill) ? fill : normal(random_);
    t.data = values.data();
    return t;
  }

  std::mt19937 random_;
  std::vector<std::vector<float>> storage_;
};

class EveryIsa : public ::testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Flash, EveryIsa, ::testing::ValuesIn(cpu::available_isas()),
                         [](const auto& info) { return info.param; });

TEST_P(EveryIsa, GivesTheSameBitsOnAnyNumberOfThreads) {
  for (const char* line : {"fwd+bwd fp32 b2 hq6 hkv2 sq300 skv410 d40 dv24 causal=bottom_right bias=1hqk:fp32 alibi "
                           "sink dropout=0.2 softcap=5",
                           "fwd+bwd fp32 b1 hq4 hkv1 sq3 skv3000 d64", "fwd+bwd fp32 b1 hq1 sq1500 d16 window=100,0"}) {
    Attention one(line), many(line);
    one.execute({.backend = "cpu_" + GetParam(), .num_threads = 1});
    many.execute({.backend = "cpu_" + GetParam(), .num_threads = 7});
    const std::vector<float> a = one.results(), b = many.results();
    EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << line;
    for (const float x : a) ASSERT_FALSE(std::isnan(x)) << line;
  }
}

TEST_P(EveryIsa, AVisibleNanReachesWhatSeesItAndNothingElse) {
  Attention run("fwd+bwd fp32 b1 hq2 hkv1 sq120 d24 causal=top_left");
  constexpr std::int64_t kBad = 70;  // key 70 is seen by the queries from 70 on
  Attention::row(run.in.v, 0, kBad, 0)[3] = kNan;
  run.execute({.backend = "cpu_" + GetParam()});
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t i = 0; i < 120; ++i) {
      for (std::int64_t c = 0; c < 24; ++c) {
        EXPECT_EQ(std::isnan(Attention::row(run.out.out, 0, i, h)[c]), i >= kBad && c == 3) << i << " " << c;
        EXPECT_EQ(std::isnan(Attention::row(run.grads.dq, 0, i, h)[c]), i >= kBad) << i << " " << c;
      }
    }
  }
}

TEST_P(EveryIsa, ANanInAQueryStaysInItsRowAndTheKeysItSees) {
  Attention run("fwd+bwd fp32 b1 hq2 hkv1 sq120 d24 causal=top_left");
  constexpr std::int64_t kBad = 50;  // query 50 of head 1 sees the keys to 50
  Attention::row(run.in.q, 0, kBad, 1)[5] = kNan;
  run.execute({.backend = "cpu_" + GetParam()});
  for (std::int64_t i = 0; i < 120; ++i) {
    EXPECT_FALSE(std::isnan(Attention::row(run.out.out, 0, i, 0)[0])) << i;
    EXPECT_EQ(std::isnan(Attention::row(run.out.out, 0, i, 1)[0]), i == kBad) << i;
    EXPECT_EQ(std::isnan(Attention::row(run.grads.dq, 0, i, 1)[0]), i == kBad) << i;
    EXPECT_EQ(std::isnan(Attention::row(run.grads.dk, 0, i, 0)[0]), i <= kBad) << i;
    EXPECT_EQ(std::isnan(Attention::row(run.grads.dv, 0, i, 0)[0]), i <= kBad) << i;
  }
}

TEST_P(EveryIsa, TouchesOnlyTensorsOfItsOwnPass) {
  Attention alone("fwd+bwd fp32 b1 hq2 sq30 d8"), mixed("fwd+bwd fp32 b1 hq2 sq30 d8"),
      unused("fwd fp32 b1 hq2 sq30 d8");
  const PlanOptions options{.backend = "cpu_" + GetParam()};
  alone.execute(options);
  mixed.in.lse = unused.out.lse;  // of a backward pass, and so none of the forward pass's business
  plan_forward(mixed.problem, {}, options).execute(mixed.in, {.out = mixed.out.out});
  EXPECT_TRUE(std::isnan(*static_cast<const float*>(unused.out.lse.data)));

  mixed.in.out = alone.out.out;
  mixed.in.lse = alone.out.lse;
  mixed.in.dout = mixed.dout;
  mixed.grads.out = unused.out.out;  // NaN, and an output
  mixed.grads.lse = unused.out.lse;
  plan_backward(mixed.problem, {}, options).execute(mixed.in, mixed.grads);
  const auto bytes = static_cast<std::size_t>(Attention::count(alone.grads.dq)) * sizeof(float);
  EXPECT_EQ(std::memcmp(mixed.grads.dq.data, alone.grads.dq.data, bytes), 0);
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
  plan_backward(problem, {}, {.backend = "cpu_" + GetParam()})
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

TEST(Exp2, IsWithinTwoUnitsInTheLastPlace) {
  using namespace cpu::of_this_test;
  double worst = 0.0;
  constexpr int kSteps = 1 << 23;
  for (int i = 0; i < kSteps; ++i) {
    const float x = -125.99F + 126.99F / kSteps * static_cast<float>(i);
    const double exact = std::exp2(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(exp2(splat(x))[0]) - exact) / exact);
  }
  EXPECT_LT(worst, 0x1p-22);
  EXPECT_EQ(exp2(splat(-126.5F))[0], 0.0F);
  EXPECT_EQ(exp2(splat(-kInfinity))[0], 0.0F);
  EXPECT_TRUE(std::isnan(exp2(splat(kNan))[0]));
}

TEST(Tanh, IsWithinFiveUnitsInTheLastPlace) {
  using namespace cpu::of_this_test;
  double worst = 0.0;
  constexpr int kSteps = 3 << 20;
  for (int i = 0; i < kSteps; ++i) {
    const float x = -20.0F + 40.0F / kSteps * static_cast<float>(i);
    const double exact = std::tanh(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(tanh(splat(x))[0]) - exact) / std::abs(exact));
  }
  EXPECT_LT(worst, 5 * 0x1p-24);
  EXPECT_EQ(tanh(splat(kInfinity))[0], 1.0F);
  EXPECT_TRUE(std::isnan(tanh(splat(kNan))[0]));
}

}  // namespace
}  // namespace fovea
