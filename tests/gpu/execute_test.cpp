// How plans run on a GPU: streams, graphs, threads, devices, and memory that lies elsewhere.
#include <dlfcn.h>
#include <fovea/c.h>
#include <fovea/error.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "cuda/jit/cache.h"
#include "cuda/nvrtc.h"
#include "cuda/planned_call.h"
#include "cuda/requests.h"
#include "tests/gpu/support.h"
#include "tests/support.h"
#include "tools/check.h"

namespace fovea::test {
namespace {

using Graphs = OnGpu;
using Streams = OnGpu;
using Threads = OnGpu;
using Devices = OnGpu;
using Memory = OnGpu;
using Tiles = OnGpu;

TEST_F(Graphs, RefuseToCaptureWhatAllocatesOrWaits) {  // so that capturing proves something
  const cuda::Stream stream(0);
  EXPECT_THROW(cuda::Graph(0, stream, [] { const cuda::DeviceMemory memory(0, 1 << 20); }), Error);
  EXPECT_THROW(cuda::Graph(0, stream, [&] { stream.synchronize(); }), Error);
}

TEST_F(Graphs, ReplayGivesTheBitsOfADirectRun) {
  for (const char* line : kLines) {
    SCOPED_TRACE(line);
    Task task(line);
    const Bits direct = task.run();
    const cuda::Graph graph(0, task.place().gpu_stream(), [&] { task.execute(); });
    for (int replay = 0; replay < 3; ++replay) {
      task.prepare();
      graph.launch(task.place().gpu_stream());
      EXPECT_EQ(task.results(), direct);
    }
  }
}

TEST_F(Streams, TwoAtOnceDoNotDisturbEachOther) {
  for (const char* line : kLines) {
    SCOPED_TRACE(line);
    Task one(line), other(kLines[0]);
    const Bits alone = one.run(), other_alone = other.run();
    one.prepare();
    other.prepare();
    for (int i = 0; i < 20; ++i) {
      one.execute();
      other.execute();
    }
    EXPECT_EQ(one.results(), alone);
    EXPECT_EQ(other.results(), other_alone);
  }
}

TEST_F(Threads, PlanAndExecuteAtOnceAndAgree) {
  constexpr int kThreads = 8, kRounds = 6;
  std::vector<Bits> expected;
  for (const char* line : kLines) expected.push_back(Task(line).run());
  std::atomic<int> agreed{0};
  const auto work = [&](int thread) {
    for (int round = 0; round < kRounds; ++round) {
      const std::size_t i = static_cast<std::size_t>(thread + round) % std::size(kLines);
      if (Task(kLines[i]).run() == expected[i]) ++agreed;
    }
  };
  std::vector<std::jthread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(work, t);
  threads.clear();
  EXPECT_EQ(agreed, kThreads * kRounds);
}

TEST_F(Threads, ShareOnePlan) {
  constexpr int kThreads = 8;
  const Problem problem = parse_problem(kLines[3]);
  const Plan plan = plan_forward(problem, kGpu);
  const Bits expected = Task(kLines[3]).run();
  std::atomic<int> agreed{0};
  const auto work = [&] {
    Task own(kLines[3]);
    const tools::Workspace workspace(own.place(), plan.workspace_bytes());
    own.prepare();
    own.call().execute(plan, workspace);
    if (own.results() == expected) ++agreed;
  };
  std::vector<std::jthread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) threads.emplace_back(work);
  threads.clear();
  EXPECT_EQ(agreed, kThreads);
}

/// The context that is this thread's current one, as the caller of the library sees it.
void* current_context() {
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
  const auto get = reinterpret_cast<int (*)(void**)>(::dlsym(library, "cuCtxGetCurrent"));
  void* context = nullptr;
  EXPECT_EQ(get(&context), 0);
  return context;
}

TEST_F(Devices, TheCallersContextStaysCurrent) {
  std::jthread([] {  // a thread on which nothing is current yet
    EXPECT_EQ(current_context(), nullptr);
    Task task(kLines[0]);
    EXPECT_EQ(current_context(), nullptr);
    (void)task.run();
    EXPECT_EQ(current_context(), nullptr);
    const cuda::CurrentGpu last(cuda::gpu_count() - 1);
    void* const own = current_context();
    EXPECT_NE(own, nullptr);
    (void)Task(kLines[0]).run();
    EXPECT_EQ(current_context(), own);
  });
}

TEST_F(Devices, EveryGpuOfAKindGivesTheSameBits) {
  if (cuda::gpu_count() < 2) GTEST_SKIP() << "there is one GPU only";
  for (const char* line : kLines) {
    SCOPED_TRACE(line);
    const Bits first = Task(line).run();
    for (int index = 1; index < cuda::gpu_count(); ++index) {
      const Device device{.kind = DeviceKind::kCuda, .index = index};
      const Bits bits = Task(line, device).run();
      if (cuda::gpu(index).name == cuda::gpu(0).name) {
        EXPECT_EQ(bits, first) << name(device);
      }
    }
  }
}

TEST_F(Devices, OneThatIsNotThereIsRefused) {
  const Device missing{.kind = DeviceKind::kCuda, .index = cuda::gpu_count()};
  const std::string said = refusal([&] { (void)plan_forward(parse_problem(kLines[0]), missing); });
  EXPECT_TRUE(contains(said, name(missing)));
}

TEST_F(Tiles, ThatAreChosenRunAndAreRight) {
  if (cuda::Nvrtc::find() == nullptr) GTEST_SKIP() << cuda::Nvrtc::why_none();
  cuda::TileChoices& choices = cuda::jit::Cache::shared().tiles(cuda::gpu(0).name);
  for (const char* line : {"fwd bf16 b2 hq2 sq300 d64 causal=top_left", "fwd fp32 b2 hq2 sq200 d64",
                           "bwd bf16 b2 hq2 sq300 d64", "bwd fp16 b2 hq2 sq300 d72 mask=b11k dropout=0.1"}) {
    const Problem problem = parse_problem(line);
    const std::string backend = fovea::explain(problem, kGpu).backend, kind = cuda::kind_of(backend, problem);
    const auto offered = cuda::tiles_on_offer(problem, backend, cuda::model_of_device(kGpu));
    ASSERT_FALSE(offered.empty()) << line;
    const std::string before = choices.find(kind);
    for (const cuda::OfferedTile& tile : {offered.front(), offered[offered.size() / 2], offered.back()}) {
      SCOPED_TRACE(line + (": " + tile.name));
      choices.set(kind, tile.name);
      const Report report = fovea::explain(problem, kGpu);
      const std::pair<std::string, std::string> chosen{"tile", tile.name + cuda::kMeasured};
      EXPECT_NE(std::ranges::find(report.details, chosen), report.details.end());
      const tools::CheckResult result = tools::check_problem(problem, 1, {.device = kGpu});
      EXPECT_TRUE(result.ok()) << testing::PrintToString(result.failures);
    }
    choices.set(kind, before);
  }
}

TEST_F(Memory, OfTheHostIsRefusedByAPlanForAGpu) {
  Task task(kLines[0]);
  const tools::Workload& work = task.work();
  const Plan plan = plan_forward(work.problem(), kGpu);
  const tools::Workspace workspace(task.place(), plan.workspace_bytes());
  const auto refused = [&](const Inputs& in, const Outputs& out) {
    return refusal([&] { plan.execute(in, out, workspace.data(), task.place().stream()); });
  };
  EXPECT_TRUE(contains(refused(work.inputs(), task.call().outputs()), "q is on cpu but the plan is for cuda:0"));
  EXPECT_TRUE(contains(refused(task.call().inputs(), work.outputs()), "out is on cpu but the plan is for cuda:0"));
}

TEST_F(Memory, OfAGpuIsRefusedByAPlanForTheCpu) {
  Task task(kLines[0]);
  const Plan plan = plan_forward(task.work().problem());
  EXPECT_TRUE(contains(refusal([&] { plan.execute(task.call().inputs(), task.call().outputs()); }),
                       "q is on cuda:0 but the plan is for cpu"));
}

TEST_F(Memory, AWorkspaceThatIsMissingOrMisalignedIsRefused) {
  Task task("bwd bf16 b1 hq2 sq200 d64 deterministic");
  const Plan plan = plan_backward(task.work().problem(), kGpu);
  ASSERT_GT(plan.workspace_bytes(), 0);
  const tools::Workspace workspace(task.place(), plan.workspace_bytes());
  const auto refused = [&](void* memory) {
    return refusal([&] { plan.execute(task.call().inputs(), task.call().outputs(), memory, task.place().stream()); });
  };
  EXPECT_TRUE(contains(refused(nullptr), "workspace is null"));
  EXPECT_TRUE(contains(refused(static_cast<std::byte*>(workspace.data()) + 8), "not aligned"));
}

/// With other inputs than the task's own.
void run(const Task& task, const Plan& plan, const Inputs& in) {
  const tools::Workspace workspace(task.place(), plan.workspace_bytes());
  plan.execute(in, task.call().outputs(), workspace.data(), task.place().stream());
  task.place().synchronize();
}

TEST_F(Memory, AMaskExpandedByStride0GivesTheBitsOfOneThatIsNot) {
  for (const char* whole : {"fwd+bwd bf16 b2 hq4 hkv2 sq303 skv384 d64 mask=bhqk deterministic",
                            "fwd bf16 b2 hq8 hkv2 sq1 skv3000 d64 mask=bhqk"}) {
    for (const char* broadcast : {"11qk", "b11k", "b1qk"}) {
      SCOPED_TRACE(std::string(whole) + " of " + broadcast);
      std::string line = whole;
      line.replace(line.find("bhqk"), 4, broadcast);
      Task task(line);
      const Bits expected = task.run();
      const Problem problem = parse_problem(whole);
      task.prepare();
      Inputs in = task.call().inputs();
      const std::int64_t full[] = {problem.batch, problem.num_q_heads, problem.seqlen_q, problem.seqlen_kv};
      for (int axis = 0; axis < 4; ++axis) {
        if (in.mask.shape[axis] != full[axis]) in.mask.shape[axis] = full[axis], in.mask.strides[axis] = 0;
      }
      run(task, plan_forward(problem, kGpu), in);
      if (problem.backward()) run(task, plan_backward(problem, kGpu), in);
      EXPECT_EQ(task.results(), expected);
    }
  }
}

TEST_F(Memory, ABiasExpandedByStride0HasTheGradientOfOneThatIsNot) {
  for (const char* line : {"bwd bf16 b2 hq2 sq300 skv264 d128 bias=bhqk deterministic",
                           "bwd fp16 b2 hq2 sq130 skv400 d64 bias=bhqk:fp32 causal=top_left deterministic"}) {
    for (const int axis : {0, 1}) {
      SCOPED_TRACE(std::string(line) + " along " + std::to_string(axis));
      Task task(line);
      const Tensor& bias = task.work().inputs().bias;
      const std::int64_t size = size_bytes(bias.dtype), part = bias.strides[axis] * size;
      for (int other = 0; other < 2; ++other) {
        std::byte* const first = static_cast<std::byte*>(bias.data) + other * bias.strides[1 - axis] * size;
        std::copy_n(first, bias.strides[1] * size, first + part);
      }
      const Bits expected = task.run();
      task.prepare();
      Inputs in = task.call().inputs();
      in.bias.strides[axis] = 0;
      run(task, plan_backward(task.work().problem(), kGpu), in);
      EXPECT_EQ(task.results(), expected);
    }
  }
}

fovea_tensor c_tensor(const Tensor& t) {
  fovea_tensor c{t.data, static_cast<std::int32_t>(t.dtype), t.rank, {FOVEA_CUDA, t.device.index, 0}, {}, {}};
  std::copy_n(t.shape.begin(), t.rank, c.shape);
  std::copy_n(t.strides.begin(), t.rank, c.strides);
  return c;
}

TEST_F(Memory, OneCallOfTheCDoorOwnsItsWorkspace) {
  Task task("fwd bf16 b1 hq8 hkv2 sq1 skv8192 d128");
  const Bits expected = task.run();
  task.prepare();
  const Inputs& in = task.call().inputs();
  const Outputs& out = task.call().outputs();
  const fovea_tensor q = c_tensor(in.q), k = c_tensor(in.k), v = c_tensor(in.v);
  const fovea_tensor o = c_tensor(out.out), lse = c_tensor(out.lse);
  ASSERT_EQ(fovea_attention_forward(&q, &k, &v, nullptr, &o, &lse), FOVEA_OK) << fovea_last_error();
  cuda::synchronize(0);
  EXPECT_EQ(task.results(), expected);
}

}  // namespace
}  // namespace fovea::test
