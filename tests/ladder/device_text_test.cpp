// The rungs' device text on an emulated GPU, against the oracle.
#include "examples/ladder/ladder.h"
#include "examples/ladder/launches.h"
#include "tests/ladder/emulator.h"
#include "tests/ladder/rungs.h"
#include "tests/ladder/support.h"

namespace fovea::ladder {
namespace {

using tools::Workload;

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

class DeviceText : public ::testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Rung, DeviceText, ::testing::Range(0, kRungs));

TEST_P(DeviceText, KeepsTheErrorRuleOnAnEmulatedGpu) {
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

}  // namespace
}  // namespace fovea::ladder
