// Calls on a GPU as `fovea check` makes them, where the GPU is a fake one whose memory is the host's: copies keep what
// they promise, and what a kernel does that it must not is seen.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include "cpu/elements.h"
#include "cpu/reference.h"
#include "dispatch/backend.h"
#include "fake_driver.h"
#include "tools/attention_call.h"
#include "tools/check.h"
#include "tools/random_problem.h"
#include "tools/workload.h"

namespace fovea::tools {
namespace {

constexpr Device kGpu{.kind = DeviceKind::kCuda};
constexpr std::size_t kWorkspaceBytes = 100;

using Execute = std::function<void(const Problem&, const Inputs&, const Outputs&, std::byte* workspace)>;

/// A kernel that does what the test says.
class Kernel final : public PlannedKernel {
 public:
  Kernel(Problem problem, Execute execute) : problem_(std::move(problem)), execute_(std::move(execute)) {}
  [[nodiscard]] std::size_t workspace_bytes() const override { return kWorkspaceBytes; }
  [[nodiscard]] std::vector<std::pair<std::string, std::string>> details() const override { return {}; }
  void execute(const Inputs& inputs, const Outputs& outputs, void* workspace, void* /*stream*/) const override {
    execute_(problem_, inputs, outputs, static_cast<std::byte*>(workspace));
  }

 private:
  Problem problem_;
  Execute execute_;
};

void attend(const Problem& p, const Inputs& in, const Outputs& out, std::byte* /*workspace*/) {
  const cpu::Results results = cpu::reference(cpu::Operands(p, in));
  for (const ResultKind& kind : result_kinds()) {
    if (kind.forward == p.forward()) cpu::store_all(out.*kind.tensor, results.*kind.values);
  }
}

CheckResult check(const Problem& problem, std::uint64_t seed, const Execute& execute, Place* place = nullptr) {
  CheckOptions options;
  options.device = kGpu;
  options.place = place;
  options.plan = [&](const Problem& asked, Direction pass) {
    Problem one = asked;
    one.direction = pass;
    Report report{.problem = one, .device = kGpu, .backend = "under test", .workspace_bytes = kWorkspaceBytes};
    return Plan(std::move(report), std::make_shared<Kernel>(one, execute));
  };
  return check_problem(problem, seed, options);
}

class DeviceCall : public ::testing::Test {
 protected:
  void SetUp() override {
    void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
    fake_ = library == nullptr ? nullptr : static_cast<FakeDriver*>(::dlsym(library, "fake_driver"));
    if (fake_ == nullptr) GTEST_SKIP() << "run it by ctest, which puts the fake driver first";
  }
  void TearDown() override {
    if (fake_ != nullptr) fake_->faults.clear();
  }
  FakeDriver* fake_ = nullptr;
};

TEST_F(DeviceCall, LetsTheOracleThrough) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const Problem problem = random_problem(seed);
    const CheckResult result = check(problem, seed, attend);
    EXPECT_TRUE(result.ok()) << to_string(problem) << "\n" << result.failures.front();
  }
}

TEST_F(DeviceCall, KeepsStridesAndAlignmentAndMovesEveryTensor) {
  const Workload work(parse_problem("fwd+bwd bf16 b2 hq4 hkv2 sq7 skv9 d8 mask=11qk bias=1hqk sink alibi kvlen=3,9"), 3,
                      Data::kHostile);
  const Place place(kGpu);
  const PlacedCall call(place, work.inputs(), work.outputs(), work.allocations());
  const auto compare = [](const char* name, const Tensor& host, const Tensor& there) {
    SCOPED_TRACE(name);
    ASSERT_EQ(host.defined(), there.defined());
    if (!host.defined()) return;
    EXPECT_EQ(there.device, kGpu);
    EXPECT_NE(there.data, host.data);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(there.data) % 64, reinterpret_cast<std::uintptr_t>(host.data) % 64);
    EXPECT_EQ(there.strides, host.strides);
  };
  for (const auto& [name, member] : kInputNames) compare(name, work.inputs().*member, call.inputs().*member);
  compare("out", work.inputs().out, call.inputs().out);
  compare("lse", work.inputs().lse, call.inputs().lse);
  for (const auto& [name, member] : kOutputNames) compare(name, work.outputs().*member, call.outputs().*member);
}

TEST_F(DeviceCall, SeesWhatAKernelMayNotTouch) {
  const Problem problem = parse_problem("fwd bf16 b1 hq2 sq5 d8");
  const auto and_writes = [](const std::function<std::byte*(const Inputs&, const Outputs&, std::byte*)>& place) {
    return [place](const Problem& p, const Inputs& in, const Outputs& out, std::byte* workspace) {
      attend(p, in, out, workspace);
      *place(in, out, workspace) = std::byte{0};
    };
  };
  const auto bytes = [](const Tensor& t) { return static_cast<std::byte*>(t.data); };
  const auto failure = [&](const Execute& execute) {
    const CheckResult result = check(problem, 5, execute);
    return result.ok() ? "" : result.failures.front();
  };
  EXPECT_EQ(failure(and_writes([&](auto&, auto& out, auto*) { return bytes(out.out) - 200; })),
            "the forward pass has written memory beside an output");
  EXPECT_EQ(
      failure(and_writes([&](auto&, auto& out, auto*) { return bytes(out.out) + 5 * out.out.strides[1] * 2 + 100; })),
      "the forward pass has written memory beside an output");
  EXPECT_EQ(failure(and_writes([&](auto&, auto&, auto* workspace) { return workspace + kWorkspaceBytes; })),
            "the forward pass has written memory past its workspace");
  EXPECT_EQ(failure(and_writes([&](auto&, auto&, auto* workspace) { return workspace + kWorkspaceBytes - 1; })), "");
  EXPECT_EQ(failure(and_writes([&](auto& in, auto&, auto*) { return bytes(in.k); })),
            "the forward pass has written an input");
}

TEST_F(DeviceCall, AGpuThatHasFailedIsBlamedOnOneProblem) {
  const Problem problem = parse_problem("fwd bf16 b1 hq2 sq5 d8");
  Place place(kGpu);
  fake_->faults["cuStreamSynchronize"] = 700;
  EXPECT_NE(check(problem, 1, attend, &place).failures.front().find("cuStreamSynchronize failed on cuda:0"),
            std::string::npos);
  fake_->faults["cuMemAlloc_v2"] = 700;  // where preparing fails for the same reason
  for (int i = 0; i < 2; ++i) {
    const CheckResult later = check(problem, 1, attend, &place);
    EXPECT_FALSE(later.run);
    EXPECT_EQ(later.failures.front(), "cuda:0 has failed in another problem");
    fake_->faults.clear();
  }
}

}  // namespace
}  // namespace fovea::tools
