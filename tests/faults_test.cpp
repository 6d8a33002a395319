// What may go wrong around the library: many threads at once, a fork after use, hostile sizes at the C++ and the C
// interface.
#include <fovea/c.h>
#include <fovea/fovea.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <tbb/task_group.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>

#include "cpu/threads.h"
#include "tests/bytes.h"
#include "tools/workload.h"

namespace fovea {
namespace {

constexpr std::array kLines = {
    "fwd fp32 b2 hq4 hkv2 sq150 d64 causal=bottom_right",
    "fwd bf16 b1 hq3 sq90 skv200 d40 mask=11qk sink",
    "fwd fp16 hq2 d32 packed=70+1+130 dropout=0.1 seed=5",
};

std::vector<char> attend(const Plan& plan, tools::Workload& data) {
  plan.execute(data.inputs(), data.outputs());
  return tests::bytes_of(data.outputs().out);
}

std::vector<char> plan_and_attend(const char* line) {
  tools::Workload data(parse_problem(line), 1);
  return attend(plan_forward(data.problem()), data);
}

TEST(Threads, PlanAndExecuteAtOnceAndAgree) {
  constexpr int kThreads = 8, kRounds = 6;
  std::array<std::vector<char>, kLines.size()> expected;
  for (std::size_t i = 0; i < kLines.size(); ++i) expected[i] = plan_and_attend(kLines[i]);
  std::atomic<int> agreed{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < kRounds; ++round) {
        const std::size_t i = static_cast<std::size_t>(t + round) % kLines.size();
        if (plan_and_attend(kLines[i]) == expected[i]) ++agreed;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(agreed, kThreads * kRounds);
}

TEST(Threads, ShareOnePlan) {
  constexpr int kThreads = 8;
  const Problem problem = parse_problem(kLines[0]);
  const Plan plan = plan_forward(problem);
  const std::vector<char> expected = plan_and_attend(kLines[0]);
  std::atomic<int> agreed{0};
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      tools::Workload data(problem, 1);
      if (attend(plan, data) == expected) ++agreed;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(agreed, kThreads);
}

TEST(Threads, TakeNoTaskOfTheCallersWhileTheyWait) {  // it may want a lock that the caller holds
#ifdef FOVEA_TSAN
  GTEST_SKIP() << "the sanitizer cannot see the order that TBB keeps";
#endif
  if (cpu::worker_count(0) < 2) GTEST_SKIP() << "there is one thread";
  static constexpr std::chrono::milliseconds kShort{1}, kLong{50};
  static thread_local bool calls = false;
  std::atomic<int> taken{0};
  tbb::task_group others;
  for (int i = 0; i < 200; ++i) {
    others.run([&] {
      if (calls) ++taken;
      std::this_thread::sleep_for(kShort);
    });
  }
  std::atomic<int> begun{0};
  const auto meet = [](void* context, std::int64_t, int) {  // two threads; the caller's is done first
    auto& count = *static_cast<std::atomic<int>*>(context);
    for (++count; count < 2;) std::this_thread::yield();
    if (!calls) std::this_thread::sleep_for(kLong);
  };
  calls = true;
  cpu::run_tasks(2, 2, meet, &begun);
  calls = false;
  others.wait();
  EXPECT_EQ(taken, 0);
}

/// Ends the process with 0 where attention comes out whole although the system gives it `most` threads.
void attend_with_threads(rlim_t most, int asked) {
  constexpr uid_t kNobodyElse = 54321;  // the system counts the threads of a user, and none of root's
  if (geteuid() == 0 && setuid(kNobodyElse) != 0) _exit(77);
  const rlimit limit{.rlim_cur = most, .rlim_max = most};
  if (setrlimit(RLIMIT_NPROC, &limit) != 0) _exit(77);
  const auto run = [](int threads) {
    tools::Workload data(parse_problem("fwd fp32 b2 hq8 sq900 skv16 d8"), 1);
    return attend(plan_forward(data.problem(), {}, {.num_threads = threads}), data);
  };
  _exit(run(asked) == run(1) ? 0 : 1);
}

bool done_or_skipped(int status) {
  return WIFEXITED(status) && (WEXITSTATUS(status) == 0 || WEXITSTATUS(status) == 77);
}

TEST(Threads, AreFewerWhereTheSystemGivesNoMore) {
#ifdef FOVEA_TSAN
  GTEST_SKIP() << "the sanitizer needs a thread of its own";
#endif
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a process that has no threads yet
  EXPECT_EXIT(attend_with_threads(1, 0), done_or_skipped, "");
  EXPECT_EXIT(attend_with_threads(1, 16), done_or_skipped, "");
  EXPECT_EXIT(attend_with_threads(4, 16), done_or_skipped, "");
}

TEST(Threads, BeyondTheProcessorsHandOnWhatATaskThrows) {
  const int workers = cpu::worker_count(0) + 2;
  std::atomic<int> begun{0};
  const auto fail = [](void* context, std::int64_t, int) {
    ++*static_cast<std::atomic<int>*>(context);
    throw std::domain_error("from a task");
  };
  EXPECT_THROW(cpu::run_tasks(1'000'000, workers, fail, &begun), std::domain_error);
  EXPECT_LE(begun, workers);
}

TEST(Threads, AskedForBeyondAllSenseAreBounded) {
  EXPECT_EQ(cpu::worker_count(7), 7);
  EXPECT_EQ(cpu::worker_count(65536), std::max(cpu::worker_count(0), 256));
}

TEST(Fork, ChildComputesAfterTheParentDid) {
  const std::vector<char> expected = plan_and_attend(kLines[0]);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // a child that waits for the parent's threads would wait for ever
    _exit(plan_and_attend(kLines[0]) == expected ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "ended by signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

/// Tensors of any shape, rank, dtype and stride, none of which has data: whatever the library makes of them, it must
/// not touch memory, and must not take the time or space that the sizes would ask for.
class HostileTensors {
 public:
  explicit HostileTensors(std::uint32_t seed) : generator_(seed) {}

  std::int64_t size() {
    constexpr std::int64_t kLeast = std::numeric_limits<std::int64_t>::min();
    constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
    constexpr std::array kSizes = {
        kLeast,           kMost,           std::int64_t{1} << 31, std::int64_t{1} << 32, std::int64_t{1} << 62,
        std::int64_t{-1}, std::int64_t{0}, std::int64_t{1},       std::int64_t{2},       std::int64_t{64}};
    return kSizes[below(kSizes.size())];
  }
  std::size_t below(std::size_t count) { return generator_() % count; }

  Tensor tensor() {
    Tensor t;
    t.rank = static_cast<int>(below(6)) - 1;
    t.dtype = static_cast<DType>(below(5));
    for (auto& extent : t.shape) extent = size();
    for (auto& stride : t.strides) stride = size();
    return t;
  }

  /// q, k and v that agree on everything but the sizes' sanity, so that the later checks are reached as well.
  std::array<Tensor, 4> call() {
    if (below(2) == 0) return {tensor(), tensor(), tensor(), tensor()};
    const auto sane = [&] { return static_cast<std::int64_t>(below(3)); };
    std::array dims = {sane(), sane(), sane(), sane(), sane()};
    dims[below(dims.size())] = size();
    const auto [batch, seqlen_q, seqlen_kv, heads, dim] = dims;
    const auto dense = [](auto... extents) {
      return Tensor{.rank = 4, .shape = {extents...}, .strides = {0, 0, 0, 1}};
    };
    return {dense(batch, seqlen_q, heads, dim), dense(batch, seqlen_kv, heads, dim),
            dense(batch, seqlen_kv, heads, dim), dense(batch, seqlen_q, heads, dim)};
  }

 private:
  std::mt19937 generator_;
};

TEST(HostileSizes, AreRefusedAtTheCppDoor) {
  HostileTensors hostile(1);
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    const auto [q, k, v, out] = hostile.call();
    AttentionOptions options;
    if (hostile.below(3) == 0) options.mask = hostile.tensor();
    if (hostile.below(3) == 0) options.kv_lengths = hostile.tensor();
    if (hostile.below(3) == 0) options.cu_seqlens_q = options.cu_seqlens_kv = hostile.tensor();
    if (hostile.below(3) == 0) options.window_left = hostile.size();
    if (hostile.below(3) == 0) options.softmax_scale = std::numeric_limits<float>::quiet_NaN();
    if (hostile.below(9) == 0) options.num_threads = static_cast<int>(hostile.size());
    try {
      attention_forward(q, k, v, options, out);
    } catch (const Error& error) {
      ++refused;
      EXPECT_NE(error.code(), ErrorCode::kInternal) << error.what();
      EXPECT_GT(std::strlen(error.what()), 10U);
    }
  }
  EXPECT_GT(refused, 10000);
}

fovea_tensor to_c(const Tensor& t) {
  fovea_tensor c{};
  c.dtype = static_cast<std::int32_t>(t.dtype);
  c.rank = t.rank;
  std::copy(t.shape.begin(), t.shape.end(), c.shape);
  std::copy(t.strides.begin(), t.strides.end(), c.strides);
  return c;
}

TEST(HostileSizes, AreRefusedAtTheCDoor) {
  HostileTensors hostile(2);
  int refused = 0;
  for (int i = 0; i < 20000; ++i) {
    std::array<fovea_tensor, 4> tensors{};
    const std::array given = hostile.call();
    std::transform(given.begin(), given.end(), tensors.begin(), to_c);
    const auto maybe = [&](const fovea_tensor& t) { return hostile.below(20) == 0 ? nullptr : &t; };
    fovea_options options{};
    options.size = hostile.below(9) == 0 ? static_cast<std::size_t>(hostile.size()) & 4095U : sizeof options;
    options.causal = static_cast<std::int32_t>(hostile.below(5)) - 1;
    if (options.size > sizeof options) options.size = sizeof options;  // more would be read
    const fovea_status status =
        fovea_attention_forward(maybe(tensors[0]), maybe(tensors[1]), maybe(tensors[2]),
                                hostile.below(2) == 0 ? &options : nullptr, maybe(tensors[3]), nullptr);
    if (status == FOVEA_OK) continue;
    ++refused;
    EXPECT_NE(status, FOVEA_INTERNAL) << fovea_last_error();
    EXPECT_GT(std::strlen(fovea_last_error()), 10U);
  }
  EXPECT_GT(refused, 10000);
}

TEST(Nulls, AreRefusedAtTheCDoor) {
  std::size_t bytes = 0;
  fovea_plan* plan = nullptr;
  fovea_inputs inputs{};
  fovea_outputs outputs{};
  inputs.size = sizeof inputs;
  outputs.size = sizeof outputs;
  EXPECT_EQ(fovea_attention_forward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_attention_backward(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
            FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_from_line(nullptr, nullptr, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_from_line(kLines[0], nullptr, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_from_tensors(FOVEA_FORWARD, nullptr, nullptr, nullptr, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_workspace_bytes(nullptr, &bytes), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_execute(nullptr, &inputs, &outputs, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_report(nullptr), nullptr);
  EXPECT_EQ(fovea_explain(nullptr, nullptr, nullptr, nullptr, 0, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_explain(kLines[0], nullptr, nullptr, nullptr, 10, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(plan, nullptr);
  fovea_plan_destroy(nullptr);

  ASSERT_EQ(fovea_plan_from_line(kLines[0], nullptr, nullptr, &plan), FOVEA_OK) << fovea_last_error();
  EXPECT_EQ(fovea_plan_execute(plan, nullptr, &outputs, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_execute(plan, &inputs, nullptr, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_execute(plan, &inputs, &outputs, nullptr, nullptr), FOVEA_INVALID_ARGUMENT);
  EXPECT_EQ(fovea_plan_workspace_bytes(plan, nullptr), FOVEA_INVALID_ARGUMENT);
  fovea_plan_destroy(plan);
}

}  // namespace
}  // namespace fovea
