// The rungs of the ladder: their twins against the oracle, what they keep and what they cost.
#include "examples/ladder/ladder.h"

#include <fovea/error.h>
#include <gtest/gtest.h>

#include <array>

#include "examples/ladder/launches.h"
#include "tests/ladder/support.h"

namespace fovea::ladder {
namespace {

using tools::Workload;

void run_twin(int rung, Workload& work) {
  for (const Direction pass : kPasses) {
    const Plan planned = plan(rung, work.problem(), pass, {});
    Memory memory(planned.workspace_bytes());
    planned.execute(work.inputs(), work.outputs(), memory.data());
  }
}

class Ladder : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Rung, Ladder, ::testing::Range(0, kRungs));

TEST_P(Ladder, TwinKeepsTheErrorRule) {
  for (const char* line :
       {"fwd+bwd fp32 b2 hq3 sq130 d64", "fwd+bwd fp32 b1 hq2 sq200 d128 causal=top_left",
        "fwd+bwd fp32 b1 hq2 sq100 skv33 d64 causal=bottom_right",
        "fwd+bwd fp32 b2 hq2 sq33 skv200 d40 causal=top_left layout=bhsd",
        "fwd+bwd fp32 b1 hq2 sq70 skv300 d24 causal=bottom_right layout=bhsd", "fwd+bwd fp32 b1 hq1 sq500 skv1 d1",
        "fwd+bwd fp32 b1 hq2 sq5 skv0 d64", "fwd+bwd fp32 b1 hq2 sq0 skv7 d64"}) {
    SCOPED_TRACE(line);
    Workload work(parse_problem(line), 7);
    work.poison_outputs();
    run_twin(GetParam(), work);
    expect_right(work);
  }
}

TEST_P(Ladder, RefusesWhatItDoesNotShow) {
  for (const char* line :
       {"fwd bf16 b1 hq1 sq8 d64", "fwd fp32 b1 hq2 hkv1 sq8 d64", "fwd fp32 b1 hq1 sq8 d64 softcap=3",
        "fwd fp32 b1 hq1 sq8 d64 window=3,-", "fwd fp32 b1 hq1 sq8 d64 dv32"}) {
    EXPECT_THROW((void)plan(GetParam(), parse_problem(line), Direction::kForward, {}), Error) << line;
  }
}

std::size_t extra_memory(int rung, const char* line, Direction pass) {
  const Problem problem = parse_problem(line);
  Params params = describe_params(problem);
  return lay_out(params, rung, problem, pass, nullptr);
}

TEST_P(Ladder, MemoryGrowsWithTheSquareOfTheLengthAtTheFootOnly) {
  for (const Direction pass : kPasses) {
    const auto one = static_cast<double>(extra_memory(GetParam(), "fwd bf16 b1 hq1 sq2048 d64", pass));
    const auto four = static_cast<double>(extra_memory(GetParam(), "fwd bf16 b1 hq1 sq8192 d64", pass));
    EXPECT_DOUBLE_EQ(four, one * (GetParam() == 0 ? 16 : 4));
  }
}

TEST(LadderCounts, NameWhatThePapersSave) {
  const Problem problem = parse_problem("fwd bf16 b4 hq16 sq4096 d64");
  std::array<Counts, kRungs> all;
  for (int rung = 0; rung < kRungs; ++rung)
    all.at(static_cast<std::size_t>(rung)) = counts(rung, problem, Direction::kForward);
  // S and P of 2^30 entries: written and read, in fp32 and bf16.
  const double tensors = 4096.0 * 64 * 2 * 64;
  EXPECT_DOUBLE_EQ(all[0].bytes, 12.0 * (1 << 30) + 4 * tensors);
  EXPECT_DOUBLE_EQ(all[0].other_per_score, 8);
  for (int rung = 1; rung < kRungs; ++rung) EXPECT_LT(all[rung].bytes, all[0].bytes) << rung;
  EXPECT_LT(all[3].other_per_score, all[1].other_per_score);
}

}  // namespace
}  // namespace fovea::ladder
