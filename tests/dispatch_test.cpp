// Who runs a problem, and what is said of it.
#include <fovea/fovea.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iostream>
#include <limits>

#include "cpu/flash_backend.h"
#include "cuda/driver.h"
#include "dispatch/backend.h"
#include "dispatch/views.h"
#include "support.h"

namespace fovea {
namespace {

const Problem kProblem = parse_problem("fwd fp32 b1 hq2 sq8 d16 causal=top_left");

std::string sentence_of(auto&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// Sets FOVEA_CPU_ISA for one scope.
struct Pinned {
  explicit Pinned(const char* isa) { setenv("FOVEA_CPU_ISA", isa, 1); }
  ~Pinned() { unsetenv("FOVEA_CPU_ISA"); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
};

TEST(Dispatch, TheBestInstructionSetOfThisCpuRuns) {
  EXPECT_EQ(explain(kProblem).backend, "cpu_" + cpu::available_isas().front());
}

TEST(Dispatch, KeepsTheVerdictOfEveryBackend) {
  const Report report = explain(kProblem);
  ASSERT_EQ(report.verdicts.size(), dispatch::backends().size());
  const std::string text = to_string(report);
  for (const Verdict& verdict : report.verdicts) EXPECT_NE(text.find(verdict.backend), std::string::npos) << text;
}

/// Asks all that is static.
void say_who_runs_it(const char* when) {
  std::cerr << when << explain(kProblem).backend << " " << explain(kProblem, {DeviceKind::kCuda, 0, 80}).backend << " "
            << cuda::why_no_driver().empty() << cuda::gpu_count();
}

TEST(ExitDeathTest, ThreadsMayCallUntilTheProcessIsGone) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto leave = [] {
    ::setenv("FOVEA_JIT", "off", 1);
    std::atexit([] { say_who_runs_it("then "); });  // so after the end of what is static
    say_who_runs_it("first ");
    std::exit(0);
  };
  EXPECT_EXIT(leave(), ::testing::ExitedWithCode(0), "first cpu_[^ ]+ cuda_portable .+then cpu_[^ ]+ cuda_portable ");
}

TEST(Dispatch, APlanThatWasMovedFromIsRefused) {
  Plan plan = plan_forward(parse_problem("fwd fp32 b1 hq1 sq0 d8"));
  const Tensor nothing = Tensor::contiguous(nullptr, DType::kFloat32, {1, 0, 1, 8});
  const auto execute = [&](const Plan& p) {
    p.execute({.q = nothing, .k = nothing, .v = nothing}, {.out = nothing});  // NOLINT(clang-analyzer-cplusplus.Move)
  };
  const Plan moved = std::move(plan);
  execute(moved);
  EXPECT_EQ(sentence_of([&] { execute(plan); }),  // NOLINT(bugprone-use-after-move)
            "the plan has been moved from; execute the one that it was moved to");
}

TEST(Dispatch, TensorsOfTheOtherDirectionAreNotLookedAt) {
  std::array<float, 4> some{1, 2, 3, 4}, more{}, lse{};
  const auto rows = [](void* data) { return Tensor::contiguous(data, DType::kFloat32, {1, 2, 1, 2}); };
  const Tensor stats = Tensor::contiguous(lse.data(), DType::kFloat32, {1, 1, 2});
  Tensor gone = rows(reinterpret_cast<void*>(64));  // memory that is nobody's
  Tensor odd = gone;
  odd.rank = 1;
  const Inputs own{.q = rows(some.data()), .k = rows(some.data()), .v = rows(some.data())};
  for (const char* backend : {"", "reference"}) {
    Inputs in = own;
    in.dout = gone, in.dlse = in.out = in.lse = odd;
    const Plan forward = plan_forward(parse_problem("fwd fp32 b1 hq1 sq2 d2"), {}, {.backend = backend});
    forward.execute(in, {.out = rows(more.data()), .lse = stats, .dq = gone, .dk = odd, .dv = gone, .dsink = odd});
    in = own;
    in.out = in.dout = rows(more.data()), in.lse = stats;
    std::array<float, 4> dq{}, dk{}, dv{};
    const Plan backward = plan_backward(forward.problem(), {}, {.backend = backend});
    backward.execute(in,
                     {.out = gone, .lse = odd, .dq = rows(dq.data()), .dk = rows(dk.data()), .dv = rows(dv.data())});
    EXPECT_NE(dv[0], 0.0F) << backend;
  }
}

TEST(Dispatch, AnyBackendCanBeNamed) {
  for (const std::string& isa : cpu::available_isas()) {
    EXPECT_EQ(plan_forward(kProblem, {}, {.backend = "cpu_" + isa}).report().backend, "cpu_" + isa);
  }
  EXPECT_EQ(plan_backward(kProblem, {}, {.backend = "reference"}).report().backend, "reference");
}

TEST(Dispatch, AnUnknownBackendIsRefusedWithTheNamesThereAre) {
  const std::string sentence = sentence_of([] { (void)plan_forward(kProblem, {}, {.backend = "cpu_mmx"}); });
  EXPECT_NE(sentence.find("'cpu_mmx'"), std::string::npos) << sentence;
  EXPECT_NE(sentence.find("cpu_portable"), std::string::npos) << sentence;
  const std::string quoted = sentence_of([] { (void)explain(kProblem, {}, {.backend = "a\n\x1b\xffz"}); });
  EXPECT_TRUE(quoted.starts_with("backend 'a???z' is unknown; name one of ")) << quoted;
}

TEST(Dispatch, ADeviceOfNoKindThereIsIsRefused) {
  EXPECT_EQ(sentence_of([] { (void)plan_forward(kProblem, {static_cast<DeviceKind>(9)}); }),
            "device kind (9) must be one of the values that have names");
}

TEST(Dispatch, AnInstructionSetCanBePinned) {
  const Pinned pinned("portable");
  const Report report = explain(kProblem);
  EXPECT_EQ(report.backend, "cpu_portable");
  EXPECT_NE(to_string(report).find("FOVEA_CPU_ISA=portable"), std::string::npos);
}

TEST(Dispatch, NobodySlowStepsInForAPinnedInstructionSet) {
  {
    const Pinned pinned("avx9");
    const std::string sentence = sentence_of([] { (void)explain(kProblem); });
    EXPECT_NE(sentence.find("FOVEA_CPU_ISA ('avx9')"), std::string::npos) << sentence;
    EXPECT_NE(sentence.find("portable"), std::string::npos) << sentence;
  }
  const std::vector<std::string> here = cpu::available_isas();
  if (std::find(here.begin(), here.end(), "avx512") != here.end()) GTEST_SKIP() << "this CPU has all of them";
  const Pinned pinned("avx512");
  const std::string sentence = sentence_of([] { (void)plan_forward(kProblem); });
  EXPECT_NE(sentence.find("no backend runs"), std::string::npos) << sentence;
  EXPECT_EQ(plan_forward(kProblem, {}, {.backend = "reference"}).report().backend, "reference");
}

TEST(Dispatch, AGpuProblemIsNeverSentToTheCpu) {
  const Device gpu{.kind = DeviceKind::kCuda, .index = 0, .compute_capability = 90};
  EXPECT_EQ(explain(kProblem, gpu).backend, "cuda_portable");
  const Device old{.kind = DeviceKind::kCuda, .index = 0, .compute_capability = 60};
  EXPECT_EQ(explain(kProblem, old).backend, "");
  const std::string sentence = sentence_of([&] { (void)plan_forward(kProblem, old); });
  EXPECT_NE(sentence.find("sm_60"), std::string::npos) << sentence;
  const Device unknown{.kind = DeviceKind::kCuda, .index = 0, .compute_capability = 130};
  EXPECT_TRUE(test::contains(sentence_of([&] { (void)plan_forward(kProblem, unknown); }), "and sm_130 has 13.0"));
}

TEST(Dispatch, ProblemsThatGpusCannotCountAreRefused) {
  for (const auto& [line, why] : {
           std::pair{"fwd bf16 b65536 hq16384 hkv1 sq1 skv64 d16",
                     "batch × num_q_heads (1073741824) is above 536870912"},
           std::pair{"bwd bf16 b65536 hq16384 hkv1 sq1 skv64 d16",
                     "batch × num_q_heads (1073741824) is above 536870912"},
           std::pair{"bwd bf16 b1 hq536870912 sq536870912 skv1 d1", "the number of blocks ("},
           std::pair{"fwd bf16 b2 hq64 hkv1 sq30000000 skv9 d16 packed_q=random:40000000 packed_kv=random:9",
                     "total_q × num_q_heads / num_kv_heads (2560000000) is above 2147483647"},
       }) {
    for (const int capability : {80, 90}) {
      const Device gpu{.kind = DeviceKind::kCuda, .index = 0, .compute_capability = capability};
      EXPECT_TRUE(test::contains(to_string(explain(parse_problem(line), gpu)), why));
    }
  }
}

TEST(Dispatch, HopperHasKernelsOfItsOwnAndSaysWhatTheyDoNotRun) {
  const auto report = [](const std::string& line, int capability = 90, const std::string& backend = "cuda_hopper") {
    return explain(parse_problem(line), {.kind = DeviceKind::kCuda, .index = 0, .compute_capability = capability},
                   {.backend = backend});
  };
  for (const char* line : {
           "fwd bf16 b2 hq4 sq512 d128 causal=bottom_right",
           "fwd fp16 b1 hq4 hkv2 sq100 skv300 d40 dv128 window=16,8 mask=b1qk bias=1hqk dropout=0.1",
           "fwd bf16 hq2 d256 packed=100+200 alibi softcap=30 sink",
           "fwd bf16 b1 hq1 sq512 d256 mask=b1qk bias=1hqk:fp32 alibi dropout=0.1 softcap=30",
       }) {
    EXPECT_EQ(report(line).backend, "cuda_hopper") << line;
    EXPECT_EQ(report(line, 80).backend, "") << line;
    EXPECT_EQ(report(line, 100).backend, "") << line;
    EXPECT_EQ(report(line, 90, "").backend, "cuda_hopper") << line;
  }
  for (const auto& [line, why] : {
           std::pair{"fwd fp32 b1 hq1 sq512 d64", "not fp32"},
           std::pair{"fwd bf16 b1 hq1 sq512 d36 dv40", "head_dim (36) is no multiple of 8"},
           std::pair{"fwd bf16 b1 hq1 sq512 d40 dv264", "head_dim_v (264) is above 256"},
           std::pair{"fwd bf16 b1 hq8 hkv2 sq4 skv4096 d256", "seqlen_q (4) is short"},
           std::pair{"bwd bf16 b1 hq1 sq512 d256 alibi softcap=30", "no tile of head_dim 256"},
           std::pair{"fwd bf16 b1 hq1 sq512 d64 alibi scale=2e-9", "softmax_scale (2e-09) is below 0.0001"},
       }) {
    const Report told = report(line);
    EXPECT_EQ(told.backend, "") << line;
    EXPECT_NE(to_string(told).find(why), std::string::npos) << to_string(told);
  }
}

TEST(Dispatch, StrictModeAcceptsTheFirstChoice) {
  EXPECT_EQ(plan_forward(kProblem, {}, {.strict = true}).report().backend, "cpu_" + cpu::available_isas().front());
}

TEST(Dispatch, ADryRunStatesTheWorkspaceThatThePlanNeeds) {
  for (const char* line : {"fwd bf16 b1 hq8 hkv1 sq1 skv9000 d64", "bwd fp16 b2 hq4 sq100 d80 alibi sink"}) {
    const Problem problem = parse_problem(line);
    const Plan plan = problem.backward() ? plan_backward(problem) : plan_forward(problem);
    EXPECT_EQ(explain(problem).workspace_bytes, plan.workspace_bytes());
    EXPECT_GT(plan.workspace_bytes(), 0U);
  }
}

TEST(Views, TakeAnyStrideOfADimensionThatNobodyWalks) {  // without the overflow that a sanitizer tells of
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  alignas(16) std::array<float, 8> numbers{};
  Tensor t = Tensor::contiguous(numbers.data(), DType::kFloat32, {1, 2, 1, 4});
  t.strides[0] = t.strides[2] = kMost;
  EXPECT_TRUE(dispatch::row_view(t).aligned);
  EXPECT_EQ(dispatch::row_view(t).row, 16);
  EXPECT_EQ(dispatch::entry_view(t).batch, 0);
  t.shape[0] = 0;
  EXPECT_EQ(dispatch::entry_view(t).query, 0);
  EXPECT_EQ(dispatch::entry_view(t).head, 16);
}

TEST(Workspace, OfAMaskExpandedByStridesOf0IsThatOfWhatItHas) {
  const auto tensor = [](DType dtype, std::initializer_list<std::int64_t> shape) {
    return Tensor::contiguous(nullptr, dtype, shape);
  };
  const Tensor q = tensor(DType::kFloat16, {4, 1000, 16, 64});
  AttentionOptions options;
  options.mask = tensor(DType::kBool, {4, 16, 1000, 1000});
  options.mask.strides = {1000, 0, 0, 1};
  for (const int capability : {80, 90}) {
    const Device gpu{.kind = DeviceKind::kCuda, .index = 0, .compute_capability = capability};
    for (const std::string pass : {"fwd", "bwd"}) {
      const Problem padding = parse_problem(pass + " fp16 b4 hq16 sq1000 d64 mask=b11k");
      EXPECT_EQ(explain(describe(padding.direction, q, q, q, options), gpu).workspace_bytes,
                explain(padding, gpu).workspace_bytes);
    }
  }
}

TEST(Workspace, GrowsWithTheLengthsAndNotWithTheirProduct) {
  const auto bytes = [](const std::string& line) { return explain(parse_problem(line)).workspace_bytes; };
  for (const std::string direction : {"fwd", "bwd"}) {
    const auto small = bytes(direction + " fp32 b1 hq1 sq16384 d64"),
               large = bytes(direction + " fp32 b1 hq1 sq65536 d64");
    EXPECT_LE(large, 5 * small);
    EXPECT_LE(large, std::size_t{64} << 20);
  }
}

TEST(Workspace, ThatNoMemoryHoldsIsRefusedBeforeItsSizeWrapsAround) {
  for (const char* sizes : {"b1 hq1 sqN skv1 d1", "bN hq1 sq1 skv1 d1", "b1 hqN hkv1 sq1 skv1 d1", "b1 hqN sq1 skv1 d1",
                            "b1 hqN sq1 skv1 d1 alibi sink", "b1 hq1 sqN skv1 d512", "b4096 hq4096 hkv1 sq1 skvN d1"}) {
    for (const std::string direction : {"fwd", "bwd"}) {
      std::size_t before = 0;
      for (int power = 20; power <= 58; ++power) {
        std::string line = direction + " fp32 " + sizes;
        line.replace(line.find('N'), 1, std::to_string(std::int64_t{1} << power));
        Report report;
        try {
          report = explain(parse_problem(line));
        } catch (const Error& error) {  // its tensors alone are beyond 2^58 elements
          EXPECT_TRUE(test::contains(error.what(), "2^58"));
          break;
        }
        if (report.backend.empty()) {
          EXPECT_TRUE(test::contains(to_string(report), "more than 2^44 rows")) << line;
          continue;
        }
        EXPECT_GE(report.workspace_bytes, before) << line;
        EXPECT_LT(report.workspace_bytes, std::size_t{1} << 63) << line;
        before = report.workspace_bytes;
      }
    }
  }
}

}  // namespace
}  // namespace fovea
