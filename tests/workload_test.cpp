#include "tools/workload.h"

#include <fovea/error.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cpu/elements.h"
#include "tools/random_problem.h"

namespace fovea::tools {
namespace {

/// The tensors a problem reads, in one list.
std::vector<Tensor> tensors_of(const Inputs& in) {
  return {in.q,    in.k,         in.v,          in.mask,         in.bias,          in.alibi_slopes,
          in.sink, in.q_lengths, in.kv_lengths, in.cu_seqlens_q, in.cu_seqlens_kv, in.out,
          in.lse,  in.dout,      in.dlse};
}

/// Bits of all elements, so that NaN equals NaN.
std::vector<std::vector<std::uint64_t>> bits_of(const Inputs& in) {
  std::vector<std::vector<std::uint64_t>> all;
  for (const Tensor& t : tensors_of(in)) {
    all.emplace_back();
    for (const double x : cpu::load_all(t)) all.back().push_back(std::bit_cast<std::uint64_t>(x));
  }
  return all;
}

TEST(Workload, DependsOnItsSeedAlone) {
  for (const Data data : {Data::kPlain, Data::kHostile}) {
    for (std::uint64_t seed = 1; seed < 20; ++seed) {
      const Problem problem = random_problem(seed);
      const Workload a(problem, seed, data), b(problem, seed, data), other(problem, seed + 1, data);
      EXPECT_EQ(a.problem(), b.problem());
      EXPECT_TRUE(data != Data::kHostile || bits_of(a.inputs()) == bits_of(b.inputs()));
      EXPECT_TRUE(problem.seqlen_q <= 1 || bits_of(a.inputs())[0] != bits_of(other.inputs())[0]);
    }
  }
}

TEST(Workload, MakesRandomLengthsDefiniteAndValid) {
  bool empty = false, full = false;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const Problem p = Workload(parse_problem("fwd fp32 b4 hq1 sq20 skv30 d1 qlen=random kvlen=random"), seed).problem();
    validate(p);
    ASSERT_EQ(p.kv_lengths.values.size(), 4U);
    for (const std::int64_t length : p.kv_lengths.values) empty |= length == 0, full |= length == 30;

    const Workload packed(parse_problem("fwd fp32 b4 hq1 sq20 skv30 d1 packed_q=random:55 packed_kv=random:30"), seed);
    const auto& slots = packed.problem().packed_q.values;
    validate(packed.problem());
    EXPECT_EQ(std::accumulate(slots.begin(), slots.end(), std::int64_t{0}), 55);
    EXPECT_EQ(*std::max_element(slots.begin(), slots.end()), 20);
    EXPECT_EQ(Workload::read(packed.inputs().cu_seqlens_q).back(), 55.0);
  }
  EXPECT_TRUE(empty && full);

  for (std::uint64_t seed = 0; seed < 30; ++seed) {  // slots drawn at run time hold the lengths that are stated
    const Problem p =
        Workload(parse_problem("fwd fp32 b3 hq1 sq9 skv9 d1 packed=random:17 qlen=0,5,2 kvlen=1,0,7 layout=qkv_packed"),
                 seed)
            .problem();
    validate(p);
    EXPECT_EQ(p.packed_q, p.packed_kv);
  }
  EXPECT_THROW(Workload(parse_problem("fwd fp32 b2 hq1 sq9 skv9 d1 packed=random:10 qlen=9,9"), 1), Error);
}

TEST(Workload, LaysTensorsOutAsTheProblemSays) {
  for (const Data data : {Data::kPlain, Data::kHostile}) {
    const Workload bhsd(parse_problem("bwd fp16 b2 hq3 sq5 skv7 d4 layout=bhsd"), 1, data);
    EXPECT_GT(bhsd.inputs().q.strides[2], bhsd.inputs().q.strides[1]);
    EXPECT_GT(bhsd.outputs().dk.strides[2], bhsd.outputs().dk.strides[1]);
    const Workload bshd(parse_problem("bwd fp16 b2 hq3 sq5 skv7 d4"), 1, data);
    EXPECT_LT(bshd.inputs().q.strides[2], bshd.inputs().q.strides[1]);

    const Workload qkv(parse_problem("bwd fp16 b2 hq4 hkv2 sq5 d6 dv3 layout=qkv_packed"), 1, data);
    const Inputs& in = qkv.inputs();
    const auto offset = [](const Tensor& a, const Tensor& b) {
      return (static_cast<char*>(b.data) - static_cast<char*>(a.data)) / 2;
    };
    EXPECT_EQ(offset(in.q, in.k), 4 * 6);
    EXPECT_EQ(offset(in.q, in.v), 4 * 6 + 2 * 6);
    EXPECT_EQ(in.q.strides[1], in.v.strides[1]);
    EXPECT_GE(in.q.strides[1], 4 * 6 + 2 * 6 + 2 * 3);
    EXPECT_EQ(offset(qkv.outputs().dq, qkv.outputs().dv), 4 * 6 + 2 * 6);
  }
}

TEST(Workload, PlainIsDenseAlignedAndReadsTheForwardsResults) {
  const Workload work(parse_problem("bwd bf16 b2 hq3 hkv1 sq5 skv7 d4 bias=bhqk sink kvlen=2,0"), 3);
  for (const Tensor& t : tensors_of(work.inputs())) {
    if (!t.defined()) continue;
    std::int64_t dense = 1;
    for (int i = t.rank - 1; i >= 0; --i) {
      EXPECT_EQ(t.strides[i], dense);
      dense *= t.shape[i];
    }
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.data) % 64, 0U);
  }
  for (const double x : Workload::read(work.inputs().k)) EXPECT_TRUE(std::isfinite(x));
  EXPECT_EQ(work.inputs().out.data, work.outputs().out.data);
  EXPECT_EQ(work.inputs().lse.data, work.outputs().lse.data);
}

TEST(Workload, HostilePoisonsWhatIsPastTheLengths) {
  const Workload work(parse_problem("bwd fp32 b2 hq2 hkv1 sq6 skv8 d3 qlen=6,2 kvlen=5,8 bias=b1qk"), 4,
                      Data::kHostile);
  const auto all_nan = [](const Tensor& t, std::int64_t b, std::int64_t row) {
    for (std::int64_t h = 0; h < t.shape[2]; ++h) {
      for (std::int64_t c = 0; c < t.shape[3]; ++c) {
        if (!std::isnan(cpu::load(t, b * t.strides[0] + row * t.strides[1] + h * t.strides[2] + c))) return false;
      }
    }
    return true;
  };
  for (int j = 0; j < 8; ++j) {
    EXPECT_EQ(all_nan(work.inputs().k, 0, j), j >= 5);
    EXPECT_EQ(all_nan(work.inputs().v, 0, j), j >= 5);
    EXPECT_FALSE(all_nan(work.inputs().v, 1, j));
  }
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(all_nan(work.inputs().q, 1, i), i >= 2);
    EXPECT_EQ(all_nan(work.inputs().dout, 1, i), i >= 2);
  }
}

TEST(Workload, HostileUsesEveryTrickNowAndThen) {
  int hidden_inside = 0, visible_nan = 0, hiding_bias = 0, no_dlse = 0, no_lse = 0, broadcast = 0, dense = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const Workload work(parse_problem("fwd+bwd fp32 b2 hq2 sq6 skv8 d3 causal=top_left mask=11qk bias=bhqk:fp32"), seed,
                        Data::kHostile);
    const Tensor& k = work.inputs().k;
    hidden_inside += std::isnan(cpu::load(k, 7 * k.strides[1])) ? 1 : 0;  // key 7 is hidden from all 6 rows
    const auto& out = work.exact().out;
    visible_nan += std::any_of(out.begin(), out.end(), [](double x) { return std::isnan(x); }) ? 1 : 0;
    const std::vector<double> bias = Workload::read(work.inputs().bias);
    hiding_bias += std::any_of(bias.begin(), bias.end(), [](double x) { return x == -HUGE_VAL; }) ? 1 : 0;
    no_dlse += work.inputs().dlse.defined() ? 0 : 1;
    no_lse += work.outputs().lse.defined() ? 0 : 1;
    broadcast += work.inputs().bias.strides[1] == 0 ? 1 : 0;
    dense += k.strides[2] == 3 ? 1 : 0;
  }
  for (const int count : {hidden_inside, hiding_bias, no_dlse, dense}) EXPECT_GT(count, 30);
  for (const int count : {visible_nan, broadcast}) EXPECT_GT(count, 2);
  EXPECT_EQ(no_lse, 0);  // the backward pass of the same problem reads it
}

TEST(Workload, NoticesEveryByteThatARunMayNotWrite) {
  int gaps = 0;
  for (std::uint64_t seed = 1; seed < 30; ++seed) {
    Workload work(parse_problem("fwd fp16 b2 hq3 sq5 skv7 d4 layout=bhsd"), seed, Data::kHostile);
    work.poison_outputs();
    EXPECT_EQ(work.damage(), "");
    const Tensor& out = work.outputs().out;
    cpu::for_each_element(out, [&](std::int64_t, std::int64_t offset) { cpu::store(out, offset, 1.0); });
    EXPECT_EQ(work.damage(), "");  // elements are what a run is for
    if (out.strides[1] > 4) {
      ++gaps;
      cpu::store(out, 4, 1.0);  // behind the first row of 4
      EXPECT_EQ(work.damage(), "a gap of an output");
      work.poison_outputs();
    }
    cpu::store(work.inputs().v, 0, 17.0);
    EXPECT_EQ(work.damage(), "an input");
  }
  EXPECT_GT(gaps, 10);
}

TEST(Shortened, KeepsTheSequencesWithTheMostRowsAndKeys) {
  const auto line = [](const char* text) {
    const Problem problem = shortened(parse_problem(text), 300);
    validate(problem);
    return to_string(problem);
  };
  EXPECT_EQ(line("fwd bf16 hq8 hkv4 d64 packed=5+7+4000 qlen=4,6,350 kvlen=1,2,3"),
            "fwd bf16 hq4 hkv2 d64 packed=300+7 qlen=300,6 kvlen=3,2");
  EXPECT_EQ(line("bwd bf16 hq1 d64 packed_q=9+9+2 packed_kv=0+500+1000"),
            "bwd bf16 hq1 hkv1 d64 packed_q=9+9 packed_kv=300+0");
  EXPECT_EQ(line("fwd bf16 b3 hq1 sq4096 d64 kvlen=0,0,4096"), "fwd bf16 b2 hq1 hkv1 sq300 skv300 d64 kvlen=300,0");
  EXPECT_EQ(line("fwd bf16 b1 hq1 sq1 skv4096 d64 causal=bottom_right"),
            "fwd bf16 b1 hq1 hkv1 sq1 skv300 d64 causal=bottom_right");
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const Problem problem = random_problem(seed);
    EXPECT_NO_THROW(validate(shortened(problem, 3))) << to_string(problem);
  }
}

TEST(RandomProblem, IsValidAndSurvivesItsLine) {
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    const Problem problem = random_problem(seed);
    ASSERT_NO_THROW(validate(problem)) << to_string(problem);
    ASSERT_EQ(parse_problem(to_string(problem)), problem) << to_string(problem);
  }
}

TEST(RandomProblem, BringsEveryTwoOptionsTogether) {
  const auto options = all_options();
  std::vector<std::vector<int>> counts(options.size(), std::vector<int>(options.size()));
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    const Problem problem = random_problem(seed * 7919 + 1);
    for (std::size_t i = 0; i < options.size(); ++i) {
      for (std::size_t j = 0; j <= i && options[i].holds(problem); ++j)
        counts[i][j] += options[j].holds(problem) ? 1 : 0;
    }
  }
  for (std::size_t i = 0; i < options.size(); ++i) {
    for (std::size_t j = 0; j <= i; ++j) {
      if (exclude_each_other(options[i], options[j])) {
        EXPECT_EQ(counts[i][j], 0) << options[i].name << " with " << options[j].name;
      } else {
        EXPECT_GE(counts[i][j], 50) << options[i].name << " with " << options[j].name;
      }
    }
  }
}

}  // namespace
}  // namespace fovea::tools
