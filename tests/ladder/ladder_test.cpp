// The rungs of the ladder against the oracle: their twins, and their device text on an emulated GPU.
#include "examples/ladder/ladder.h"

#include <fovea/error.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "examples/ladder/launches.h"
#include "tests/ladder/emulator.h"
#include "tests/ladder/rungs.h"
#include "tools/error_rule.h"
#include "tools/workload.h"

namespace fovea::ladder {
namespace {

using tools::Workload;

constexpr Direction kPasses[] = {Direction::kForward, Direction::kBackward};

/// 64-byte aligned, as a plan's workspace is, and full of NaN.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : words_(bytes / sizeof(Word) + 1) { std::memset(data(), 0xff, bytes); }
  [[nodiscard]] std::byte* data() { return words_.front().bytes; }

 private:
  struct alignas(64) Word {
    std::byte bytes[64];
  };
  std::vector<Word> words_;
};

/// Every result of a run by the error rule.
void expect_right(const Workload& work) {
  const cpu::Operands operands(work.problem(), work.inputs());
  const tools::Peers peers(operands, cpu::reference(operands));
  for (const tools::ResultKind& kind : tools::result_kinds()) {
    const Tensor& tensor = work.outputs().*kind.tensor;
    if (!tensor.defined()) continue;
    const tools::Figure figure = tools::judge(kind, peers, tensor);
    EXPECT_EQ(figure.failure, "") << figure.name;
  }
}

void run_twin(int rung, Workload& work) {
  for (const Direction pass : kPasses) {
    const Plan planned = plan(rung, work.problem(), pass, {});
    Memory memory(planned.workspace_bytes());
    planned.execute(work.inputs(), work.outputs(), memory.data());
  }
}

void run_emulated(int rung, Workload& work, std::uint32_t seed) {
  const Problem& problem = work.problem();
  tests::Emulator emulator(seed);
  for (const Direction pass : kPasses) {
    Params params = describe_params(problem);
    attach(params, pass, work.inputs(), work.outputs());
    Memory memory(lay_out(params, rung, problem, pass, nullptr));
    lay_out(params, rung, problem, pass, memory.data());
    for (const Launch& launch : launches(rung, problem, pass)) {
      const Kernel kernel = emulated(launch.function, static_cast<int>(problem.head_dim));
      emulator.launch(launch.blocks, launch.threads, emulated_shared(), static_cast<std::size_t>(launch.shared_bytes),
                      [&] { kernel(params); });
    }
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

TEST_P(Ladder, DeviceTextKeepsTheErrorRule) {
  std::uint32_t seed = 1;
  for (const char* line :
       {"fwd+bwd bf16 b1 hq2 sq40 skv150 d64", "fwd+bwd bf16 b1 hq1 sq140 d64 causal=top_left layout=bhsd",
        "fwd+bwd bf16 b1 hq1 sq70 skv30 d128 causal=bottom_right", "fwd+bwd bf16 b1 hq1 sq7 skv0 d64"}) {
    SCOPED_TRACE(line);
    Workload work(parse_problem(line), seed);
    work.poison_outputs();
    run_emulated(GetParam(), work, seed++);
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
  std::vector<Counts> all;
  for (int rung = 0; rung < kRungs; ++rung) all.push_back(counts(rung, problem, Direction::kForward));
  // S and P of 2^30 entries: written and read, in fp32 and bf16.
  const double tensors = 4096.0 * 64 * 2 * 64;
  EXPECT_DOUBLE_EQ(all[0].bytes, 12.0 * (1 << 30) + 4 * tensors);
  EXPECT_DOUBLE_EQ(all[0].other_per_score, 8);
  for (int rung = 1; rung < kRungs; ++rung) EXPECT_LT(all[rung].bytes, all[0].bytes) << rung;
  EXPECT_LT(all[3].other_per_score, all[1].other_per_score);
}

}  // namespace
}  // namespace fovea::ladder
