#pragma once

#include <fovea/fovea.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/driver.h"
#include "tests/bytes.h"
#include "tools/attention_call.h"
#include "tools/device_call.h"
#include "tools/workload.h"

namespace fovea::test {

inline constexpr Device kGpu{.kind = DeviceKind::kCuda};

/// Tests that say why they are skipped where there is no GPU.
class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::why_no_driver().empty()) GTEST_SKIP() << cuda::why_no_driver();
  }
};

using Bits = std::vector<std::vector<char>>;

/// A problem line with tensors and plans of its own, on a stream of its own.
class Task {
 public:
  explicit Task(const std::string& line, const Device& device = kGpu)
      : work_(parse_problem(line), 1),
        place_(device),
        call_(place_, work_.inputs(), work_.outputs(), work_.allocations()) {
    const Problem& problem = work_.problem();
    if (problem.forward()) add(plan_forward(problem, device));
    if (problem.backward()) add(plan_backward(problem, device));
  }

  /// Everything anew: inputs as they are on the host, results and workspaces full of garbage.
  void prepare() {
    work_.poison_outputs();
    call_.upload();
    for (const Step& step : steps_) step.workspace.fill(0xff);
    place_.synchronize();
  }

  /// Queued into the task's stream.
  void execute() const {
    for (const Step& step : steps_) call_.execute(step.plan, step.workspace);
  }

  /// What is there when the stream has run dry.
  [[nodiscard]] Bits results() {
    call_.download();
    EXPECT_FALSE(call_.overrun());
    Bits bits;
    for (const auto& [name, member] : tools::kOutputNames) {
      if ((work_.outputs().*member).defined()) bits.push_back(tests::bytes_of(work_.outputs().*member));
    }
    return bits;
  }

  [[nodiscard]] Bits run() {
    prepare();
    execute();
    return results();
  }

  [[nodiscard]] tools::Workload& work() { return work_; }
  [[nodiscard]] const tools::Place& place() const { return place_; }
  [[nodiscard]] const tools::PlacedCall& call() const { return call_; }

 private:
  struct Step {
    Plan plan;
    tools::Workspace workspace;
  };
  void add(Plan plan) {
    tools::Workspace workspace(place_, plan.workspace_bytes());
    steps_.push_back({std::move(plan), std::move(workspace)});
  }

  tools::Workload work_;
  tools::Place place_;
  tools::PlacedCall call_;
  std::vector<Step> steps_;
};

/// Problems of several kinds; `deterministic`, so that bits can be compared.
inline const char* const kLines[] = {
    "fwd+bwd bf16 b2 hq4 hkv2 sq300 skv400 d64 causal=bottom_right deterministic",
    "fwd+bwd fp32 b1 hq2 sq130 d80 mask=11qk bias=1hqk dropout=0.1 seed=3 deterministic",
    "fwd+bwd fp16 hq4 d64 packed=70+300+1 sink alibi causal=top_left deterministic",
    "fwd bf16 b1 hq8 hkv2 sq1 skv8192 d128 kvlen=8000",
    "bwd fp16 b3 hq4 hkv2 sq300 skv264 d64 kvlen=264,0,100 bias=111k causal=bottom_right deterministic",
};

}  // namespace fovea::test
