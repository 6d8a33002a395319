#include "tools/check.h"

#include <fovea/error.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>

#include "cpu/elements.h"
#include "cpu/reference.h"
#include "tests/kernel_under_test.h"
#include "tests/support.h"
#include "tools/random_problem.h"
#include "tools/workload.h"

// The check itself: it lets the right results through and stops kernels that are wrong in one small way.
namespace fovea::tools {
namespace {

CheckResult check_kernel(const std::string& line, std::uint64_t seed, const Execute& execute) {
  return tools::check_kernel(parse_problem(line), seed, execute);
}

/// The oracle on operands that the test has tampered with.
template <class Tamper>
Execute oracle_with(const Tamper& tamper) {
  return [tamper](const Problem& p, const Inputs& in, const Outputs& out, std::byte*) {
    cpu::Operands x(p, in);
    tamper(x);
    store(out, p, cpu::reference(x));
  };
}

/// The oracle's results, tampered with before they are stored.
template <class Tamper>
Execute results_with(const Tamper& tamper) {
  return [tamper](const Problem& p, const Inputs& in, const Outputs& out, std::byte*) {
    const cpu::Operands x(p, in);
    cpu::Results results = cpu::reference(x);
    tamper(x, results);
    store(out, p, results);
  };
}

std::string all_of(const std::vector<std::string>& sentences) {
  std::string text;
  for (const std::string& sentence : sentences) text += sentence + "\n";
  return text;
}

/// Some lines, so that a fault is not found by luck.
const char* const kDTypes[] = {"fp32", "fp16", "bf16"};
constexpr std::uint64_t kSeeds = 5;

template <class Fault>
void expect_caught(const std::string& options, const Fault& fault) {
  for (const char* dtype : kDTypes) {
    for (const char* direction : {"fwd ", "bwd "}) {
      for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
        const std::string line = direction + std::string(dtype) + " " + options;
        EXPECT_TRUE(check_kernel(line, seed, oracle_with([](cpu::Operands&) {})).ok()) << line;
        EXPECT_FALSE(check_kernel(line, seed, fault).ok()) << line << " --seed " << seed;
      }
    }
  }
}

TEST(Check, LetsTheOracleThrough) {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    const Problem problem = random_problem(seed);
    const CheckResult result = check_problem(problem, seed, {.backend = "reference"});
    EXPECT_TRUE(result.ok()) << to_string(problem) << "\n" << all_of(result.failures);
    for (const Figure& figure : result.figures) EXPECT_LE(figure.ratio, 1.0) << figure.name << to_string(problem);
  }
}

TEST(RandomProblem, OfOneKindAsksForTheSameKernels) {
  for (std::uint64_t kind = 0; kind < 20; ++kind) {
    const Problem first = random_problem(1, kind);
    for (std::uint64_t seed = 2; seed < 20; ++seed) {
      const Problem p = random_problem(seed, kind);
      EXPECT_EQ(p.direction, first.direction);
      EXPECT_EQ(p.dtype, first.dtype);
      EXPECT_EQ(p.head_dim, first.head_dim);
      EXPECT_EQ(p.head_dim_v, first.head_dim_v);
      EXPECT_EQ(p.causal, first.causal);
      EXPECT_EQ(p.window_left.has_value(), first.window_left.has_value());
      EXPECT_EQ(p.mask.has_value(), first.mask.has_value());
      EXPECT_EQ(p.bias.has_value(), first.bias.has_value());
      EXPECT_EQ(p.alibi != Alibi::kNone, first.alibi != Alibi::kNone);
      EXPECT_EQ(p.softcap != 0, first.softcap != 0);
      EXPECT_EQ(p.dropout.probability != 0, first.dropout.probability != 0);
      EXPECT_EQ(p.deterministic, first.deterministic);
    }
  }
}

TEST(Check, CatchesADiagonalOneOff) {
  expect_caught("b2 hq2 sq40 skv50 d16 causal=top_left", oracle_with([](cpu::Operands& x) {
                  x.problem.causal = Causal::kNone;
                  x.problem.window_right = x.sequences[0].len_q - x.sequences[0].len_kv + 1;
                }));
}

TEST(Check, CatchesTheOtherCorner) {
  expect_caught("b2 hq2 sq60 skv61 d16 causal=bottom_right",
                oracle_with([](cpu::Operands& x) { x.problem.causal = Causal::kTopLeft; }));
}

TEST(Check, CatchesALostDropoutScale) {
  expect_caught("b2 hq2 sq40 skv50 d16 dropout=0.1", results_with([](const cpu::Operands& x, cpu::Results& results) {
                  for (double& out : results.out) out *= 1.0 - static_cast<double>(x.problem.dropout.probability);
                  for (double& dv : results.dv) dv *= 1.0 - static_cast<double>(x.problem.dropout.probability);
                }));
}

TEST(Check, CatchesOneWrongDropoutBit) {
  // fp32 alone: among 50 keys one entry is less than what the roundings of bf16 may do.
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const auto fault = oracle_with([](cpu::Operands& x) {
      if (x.sequences[0].len_kv == 50) x.mask = {true, std::vector<double>(50, 1.0), {0, 0, 0, 1}};
      x.mask.values[20] = 0.0;
    });
    EXPECT_FALSE(check_kernel("fwd fp32 b1 hq1 sq40 skv50 d16 dropout=0.1", seed, fault).ok());
  }
}

TEST(Check, CatchesSwappedHeads) {
  expect_caught("b1 hq2 hkv2 sq20 skv30 d16", oracle_with([](cpu::Operands& x) {
                  for (std::size_t row = 0; row < x.v.size() / 32; ++row) {
                    std::swap_ranges(&x.v[row * 32], &x.v[row * 32 + 16], &x.v[row * 32 + 16]);
                  }
                }));
}

TEST(Check, CatchesASlightlyWrongScale) {
  // By how much: 16-bit scores of the plain formula are themselves off by some parts in a thousand.
  for (const auto& [dtype, factor] : {std::pair{"fp32", 1.0001F}, {"fp16", 1.02F}, {"bf16", 1.1F}}) {
    for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
      const auto fault = oracle_with(
          [by = factor](cpu::Operands& x) { x.problem.softmax_scale = by * static_cast<float>(x.scale()); });
      EXPECT_FALSE(check_kernel(std::string("fwd+bwd ") + dtype + " b2 hq2 sq40 skv50 d16", seed, fault).ok()) << dtype;
    }
  }
}

TEST(Check, CatchesARowOfSmallGradientsBesideLargeOnes) {
  // Keys far behind ALiBi's distance get gradients a million times smaller: a maximum over the tensor would not see
  // them.
  const auto fault = results_with([](const cpu::Operands& x, cpu::Results& results) {
    if (results.dk.empty()) return;
    std::size_t least = 0;
    for (std::size_t i = 0; i < results.dk.size(); ++i) {
      if (results.dk[i] != 0.0 && std::abs(results.dk[i]) < std::abs(results.dk[least]))
        least = i / x.problem.head_dim * x.problem.head_dim;
    }
    for (std::int64_t c = 0; c < x.problem.head_dim; ++c) results.dk[least + c] = 0.0;
  });
  int caught = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    caught += check_kernel("bwd fp32 b1 hq1 sq1 skv200 d8 alibi", seed, fault).ok() ? 0 : 1;
  }
  EXPECT_GE(caught, 15);  // some slopes are so small that no gradient is
}

TEST(Check, CatchesValuesThatMustBeExact) {
  std::string line = "fwd+bwd fp32 b1 hq1 sq9 skv4 d4 causal=bottom_right";  // rows 0 to 4 see nothing
  const auto expect_failure = [&](const Execute& fault, const char* of) {
    const CheckResult result = check_kernel(line, 1, fault);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.failures[0].substr(0, std::strlen(of)), of);
  };
  expect_failure(results_with([](const auto&, cpu::Results& r) { r.out[3] = 1e-30; }), "out[0, 0, 0, 3]");
  expect_failure(results_with([](const auto&, cpu::Results& r) { r.lse[2] = -1e30; }), "lse[0, 0, 2]");
  expect_failure(results_with([](const auto&, cpu::Results& r) { r.lse[2] = NAN; }), "lse[0, 0, 2]");
  expect_failure(results_with([](const auto&, cpu::Results& r) { r.out[30] = NAN; }), "out[0, 7, 0, 2]");
  expect_failure(results_with([](const auto&, cpu::Results& r) {
                   if (!r.dq.empty()) r.dq[0] = -1e-30;
                 }),
                 "dq[0, 0, 0, 0]");
  line.replace(line.find("fp32"), 4, "fp16");
  expect_failure(results_with([](const auto&, cpu::Results& r) { r.out[3] = 0x1p-24; }), "out[0, 0, 0, 3]");
}

TEST(ErrorRule, HoldsLargeElementsAgainstThePeersOfLargeOnes) {
  Workload work(parse_problem("fwd fp32 b1 hq1 sq20 skv30 d16"), 2, Data::kHostile);
  Peers peers(work.operands(), work.exact());
  const ResultKind& out = result_kinds()[0];
  const auto order = [](double a, double b) { return std::abs(a) < std::abs(b); };
  const auto [small, large] = std::minmax_element(peers.exact.out.begin(), peers.exact.out.end(), order);
  const auto at_small = small - peers.exact.out.begin(), at_large = large - peers.exact.out.begin();
  ASSERT_LT(std::abs(*small), 1e-2 * std::abs(*large));
  peers.unavoidable.out.computed[at_small] = 1e-3;  // what is small in all terms
  peers.unavoidable.out.stored[at_small] = 0.0;
  peers.plain.out[at_small] += 1e-7;  // and a peer that is relatively far off, though it hardly matters
  std::vector<double> result = peers.exact.out;
  cpu::store_all(work.outputs().out, result);
  EXPECT_LE(judge(out, peers, work.outputs().out).ratio, 1.0);
  result[at_large] += 2e-5;
  cpu::store_all(work.outputs().out, result);
  EXPECT_GT(judge(out, peers, work.outputs().out).ratio, kMostRatio);
}

TEST(ErrorRule, LetsScoreGradientsBelowTheSmallestNormalNumberBe0) {
  const Workload work(parse_problem("bwd fp32 b1 hq1 sq1 skv2 d1 scale=1"), 1, Data::kHostile);
  cpu::Operands x = work.operands();
  x.q = {1000.0}, x.k = {0.0, -0.0832};               // p is 2^-120
  x.v = {0.001, 0.002}, x.dout = {1.0}, x.dlse = {};  // and ds a thousandth of it
  const Peers peers(x, cpu::reference(x));
  const ResultKind& dk = result_kinds()[3];
  std::vector<double> result = peers.exact.dk;
  ASSERT_GT(std::abs(result[1]), 0x1p-126);
  result[1] = 0.0;  // what comes of ds flushed to 0
  cpu::store_all(work.outputs().dk, result);
  EXPECT_LE(judge(dk, peers, work.outputs().dk).ratio, 1.0);
  result[1] = 1e-33;
  cpu::store_all(work.outputs().dk, result);
  EXPECT_GT(judge(dk, peers, work.outputs().dk).ratio, kMostRatio);
}

TEST(Check, CatchesASwallowedNaN) {
  int planted = 0;
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    const auto swallow = results_with([&](const auto&, cpu::Results& r) {
      bool any = false;
      for (double& out : r.out) any = any || std::isnan(out), out = std::isnan(out) ? 0.0 : out;
      planted += any ? 1 : 0;
    });
    const int before = planted;
    const bool ok = check_kernel("fwd fp32 b1 hq2 sq9 skv12 d4", seed, swallow).ok();
    EXPECT_EQ(ok, planted == before) << seed;
  }
  EXPECT_GT(planted, 3);
}

TEST(Check, CatchesWhatARunMayNotTouch) {
  const Execute right = oracle_with([](cpu::Operands&) {});
  int gaps = 0;
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const auto writes_past_rows = [&](const Problem& p, const Inputs& in, const Outputs& out, std::byte* workspace) {
      right(p, in, out, workspace);
      if (out.out.strides[2] > 8) cpu::store(out.out, 8, 0.0), ++gaps;
    };
    const int before = gaps;
    const CheckResult past = check_kernel("fwd bf16 b1 hq2 sq5 d8", seed, writes_past_rows);
    EXPECT_EQ(all_of(past.failures), gaps == before ? "" : "the forward pass has written a gap of an output\n");

    const auto writes_input = [&](const Problem& p, const Inputs& in, const Outputs& out, std::byte* workspace) {
      right(p, in, out, workspace);
      cpu::store(in.k, 0, 3.0);
    };
    EXPECT_EQ(check_kernel("fwd bf16 b1 hq2 sq5 d8", seed, writes_input).failures.front(),
              "the forward pass has written an input");
  }
  EXPECT_GT(gaps, 5);
}

TEST(Check, CatchesAnUnwrittenElement) {
  const auto forgets = [](const Problem& p, const Inputs& in, const Outputs& out, std::byte*) {
    cpu::Results results = cpu::reference(p, in);
    Tensor some = out.out;
    --some.shape[1];
    cpu::store_all(some, results.out);
    cpu::store_all(out.lse, results.lse);
  };
  EXPECT_FALSE(check_kernel("fwd fp32 b1 hq2 sq5 d8", 1, forgets).ok());
}

TEST(Check, CatchesAKernelThatReadsItsWorkspace) {
  const auto reads = [](const Problem& p, const Inputs& in, const Outputs& out, std::byte* workspace) {
    cpu::Results results = cpu::reference(p, in);
    if (workspace[kWorkspaceBytes - 1] != std::byte{0}) results.out[0] = NAN;
    store(out, p, results);
  };
  EXPECT_FALSE(check_kernel("fwd fp32 b1 hq2 sq5 d8", 1, reads).ok());
}

TEST(Check, CatchesOtherBitsOnASecondRun) {
  for (const bool promised : {true, false}) {
    double factor = 1.0;
    const auto wavers = [&](const Problem& p, const Inputs& in, const Outputs& out, std::byte*) {
      cpu::Results results = cpu::reference(p, in);
      for (double& dq : results.dq) dq *= factor;
      factor += 0x1p-22;
      store(out, p, results);
    };
    const std::string line = std::string("bwd fp32 b1 hq2 sq5 d7") + (promised ? " deterministic" : "");
    const CheckResult result = check_kernel(line, 1, wavers);
    EXPECT_EQ(all_of(result.failures), promised ? "the backward pass gives other bits of dq on a second run\n" : "");
  }
}

TEST(Check, MakesAFailureOfARefusal) {
  const auto throws = [](const Problem&, const Inputs&, const Outputs&, std::byte*) {
    throw Error(ErrorCode::kDevice, "the device is on fire");
  };
  EXPECT_EQ(all_of(check_kernel("fwd fp32 b1 hq2 sq5 d8", 1, throws).failures), "the device is on fire\n");
}

void store_plain(const Workload& work, const Peers& peers) {
  for (const ResultKind& kind : result_kinds()) cpu::store_all(work.outputs().*kind.tensor, peers.plain.*kind.values);
}

/// A peer that is far off would let everything through.
TEST(PlainFormula, StaysNearTheOracle) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    for (const auto& [dtype, limit] :
         {std::pair{DType::kFloat32, 4.0}, {DType::kFloat16, 60.0}, {DType::kBFloat16, 60.0}}) {
      Problem problem = random_problem(seed);
      if (problem.bias && problem.bias_dtype != DType::kFloat32) problem.bias_dtype = dtype;
      problem.dtype = dtype;
      problem.softmax_scale = {};
      if (problem.seqlen_kv > 300) problem.alibi = Alibi::kNone;  // scores so large have no digits left in 16 bits
      problem.direction = Direction::kForwardBackward;
      Workload work(problem, seed, Data::kHostile);
      Peers peers(work.operands(), work.exact());
      store_plain(work, peers);
      peers.plain = peers.exact;  // so that the plain formula is judged by the unavoidable roundings alone
      for (const ResultKind& kind : result_kinds()) {
        if (kind.values != &cpu::Results::out && kind.values != &cpu::Results::dv) continue;  // others cancel
        const Figure figure = judge(kind, peers, work.outputs().*kind.tensor);
        EXPECT_LE(figure.ratio, limit) << to_string(problem) << " --seed " << seed << "\n" << figure.failure;
      }
    }
  }
}

TEST(RunCheck, PrintsALineEachInOrderAndHowToRepeatAFailure) {
  CheckRun run;
  for (const char* line : {"fwd fp32 b1 hq1 sq3 d4", "bwd bf16 b1 hq2 sq70 d64", "fwd fp16 b1 hq1 sq2 d8"}) {
    run.problems.push_back(parse_problem(line));
  }
  run.seed = 5;
  run.options.backend = "reference";
  testing::internal::CaptureStdout();
  EXPECT_EQ(run_check(run), 0);
  std::string text = testing::internal::GetCapturedStdout();
  std::size_t at = 0;
  for (const Problem& problem : run.problems) {
    at = text.find(to_string(problem), at);
    ASSERT_NE(at, std::string::npos) << text;
  }
  EXPECT_NE(text.find("3 problems, 0 violations"), std::string::npos) << text;

  run.options.backend = "cuda_portable";
  testing::internal::CaptureStdout();
  EXPECT_EQ(run_check(run), 1);
  text = testing::internal::GetCapturedStdout();
  EXPECT_NE(text.find("fovea check \"" + to_string(run.problems[1]) + "\" --seed 5 --backend cuda_portable"),
            std::string::npos)
      << text;
  EXPECT_NE(text.find("3 problems, 3 violations"), std::string::npos) << text;
}

TEST(RunCheck, TellsWhatIsWrongWithTheAskingFromAViolation) {
  CheckRun run;
  run.problems = {parse_problem("fwd fp32 b1 hq1 sq3 d4")};
  run.options.backend = "nobody";
  EXPECT_TRUE(test::contains(test::refusal([&] { (void)run_check(run); }), "backend 'nobody' is unknown"));
}

TEST(RunCheck, GivesTheSameRandomProblemsForTheSameSeed) {
  const auto text_of = [](std::uint64_t seed, int jobs) {
    CheckRun run;
    run.random = 12;
    run.seed = seed;
    run.jobs = jobs;
    run.options.backend = "reference";
    testing::internal::CaptureStdout();
    EXPECT_EQ(run_check(run), 0);
    const std::string text = testing::internal::GetCapturedStdout();
    return text.substr(0, text.find("12 problems"));
  };
  EXPECT_EQ(text_of(3, 1), text_of(3, 4));
  EXPECT_NE(text_of(3, 1), text_of(4, 1));
}

}  // namespace
}  // namespace fovea::tools
