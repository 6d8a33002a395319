#include <fovea/c.h>
#include <fovea/fovea.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "support.h"
#include "tools/random_problem.h"
#include "tools/workload.h"

namespace fovea {
namespace {

using test::contains;
using tools::Workload;

/// C views of C++ tensors; they live as long as this does.
class Views {
 public:
  const fovea_tensor* operator()(const Tensor& t) {
    if (!t.defined()) return nullptr;
    fovea_tensor& c = kept_.emplace_back();
    c.data = t.data;
    c.dtype = static_cast<std::int32_t>(t.dtype);
    c.rank = t.rank;
    std::copy(t.shape.begin(), t.shape.end(), c.shape);
    std::copy(t.strides.begin(), t.strides.end(), c.strides);
    return &c;
  }

 private:
  std::deque<fovea_tensor> kept_;
};

fovea_inputs to_c(Views& view, const Inputs& in) {
  return {sizeof(fovea_inputs),
          view(in.q),
          view(in.k),
          view(in.v),
          view(in.mask),
          view(in.bias),
          view(in.alibi_slopes),
          view(in.sink),
          view(in.q_lengths),
          view(in.kv_lengths),
          view(in.cu_seqlens_q),
          view(in.cu_seqlens_kv),
          view(in.out),
          view(in.lse),
          view(in.dout),
          view(in.dlse),
          nullptr};
}

fovea_outputs to_c(Views& view, const Outputs& out) {
  return {sizeof(fovea_outputs), view(out.out),   view(out.lse),           view(out.dq),   view(out.dk),
          view(out.dv),          view(out.dbias), view(out.dalibi_slopes), view(out.dsink)};
}

fovea_options to_c(const Problem& p, const fovea_inputs& in) {
  fovea_options o{};
  o.size = sizeof o;
  o.causal = static_cast<std::int32_t>(p.causal);
  o.has_softmax_scale = p.softmax_scale ? 1 : 0;
  o.softmax_scale = p.softmax_scale.value_or(std::numeric_limits<float>::quiet_NaN());
  o.has_window_left = p.window_left ? 1 : 0;
  o.window_left = p.window_left.value_or(-7);
  o.has_window_right = p.window_right ? 1 : 0;
  o.window_right = p.window_right.value_or(-7);
  o.softcap = p.softcap;
  o.dropout_probability = p.dropout.probability;
  o.dropout_seed = p.dropout.seed;
  o.dropout_offset = p.dropout.offset;
  o.deterministic = 1;
  o.mask = in.mask;
  o.bias = in.bias;
  o.alibi_slopes = in.alibi_slopes;
  o.sink = in.sink;
  o.q_lengths = in.q_lengths;
  o.kv_lengths = in.kv_lengths;
  o.cu_seqlens_q = in.cu_seqlens_q;
  o.cu_seqlens_kv = in.cu_seqlens_kv;
  return o;
}

/// What was written, gaps left out; a NaN equals itself.
std::vector<std::vector<double>> results(const Workload& data) {
  const Outputs& o = data.outputs();
  std::vector<std::vector<double>> all;
  for (const Tensor& t : {o.out, o.lse, o.dq, o.dk, o.dv, o.dbias, o.dalibi_slopes, o.dsink}) {
    all.push_back(t.defined() ? Workload::read(t) : std::vector<double>{});
    for (double& x : all.back()) x = x != x ? 12345.0 : x;
  }
  return all;
}

struct Ways {
  std::vector<std::vector<double>> cpp, c_plan, c_call;
};

/// The same workload through the C++ interface, a C plan and the one-call C functions.
Ways run_every_way(const Problem& problem, std::uint64_t seed) {
  Workload data(problem, seed);
  const Problem& p = data.problem();
  Views view;
  const fovea_inputs in = to_c(view, data.inputs());
  const fovea_outputs out = to_c(view, data.outputs());
  const fovea_options options = to_c(p, in);
  Ways ways;

  data.poison_outputs();
  plan_forward(p).execute(data.inputs(), data.outputs());
  if (p.backward()) plan_backward(p).execute(data.inputs(), data.outputs());
  ways.cpp = results(data);

  data.poison_outputs();
  for (const std::int32_t direction : {FOVEA_FORWARD, FOVEA_BACKWARD}) {
    if (direction == FOVEA_BACKWARD && !p.backward()) continue;
    fovea_plan* plan = nullptr;
    EXPECT_EQ(fovea_plan_from_tensors(direction, in.q, in.k, in.v, &options, &plan), FOVEA_OK) << fovea_last_error();
    EXPECT_EQ(fovea_plan_execute(plan, &in, &out, nullptr, nullptr), FOVEA_OK) << fovea_last_error();
    fovea_plan_destroy(plan);
  }
  ways.c_plan = results(data);

  data.poison_outputs();
  EXPECT_EQ(fovea_attention_forward(in.q, in.k, in.v, &options, out.out, out.lse), FOVEA_OK) << fovea_last_error();
  if (p.backward()) {
    EXPECT_EQ(fovea_attention_backward(in.q, in.k, in.v, in.out, in.lse, in.dout, &options, &out, in.dlse), FOVEA_OK)
        << fovea_last_error();
  }
  ways.c_call = results(data);
  return ways;
}

TEST(CDoor, ComputesWhatTheCppDoorDoesWhateverTheOptions) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    Problem problem = tools::random_problem(seed);
    problem.deterministic = true;
    const Ways ways = run_every_way(problem, seed);
    EXPECT_EQ(ways.c_plan, ways.cpp) << to_string(problem);
    EXPECT_EQ(ways.c_call, ways.cpp) << to_string(problem);
  }
}

TEST(CDoor, PlansALineWithAWorkspaceOfTheCallers) {
  const char* const line = "fwd fp32 b2 hq4 hkv2 sq9 skv40 d16 causal=bottom_right";
  fovea_plan* plan = nullptr;
  ASSERT_EQ(fovea_plan_from_line(line, nullptr, nullptr, &plan), FOVEA_OK) << fovea_last_error();
  EXPECT_EQ(fovea_plan_report(plan), to_string(explain(parse_problem(line))));
  std::size_t bytes = 0;
  ASSERT_EQ(fovea_plan_workspace_bytes(plan, &bytes), FOVEA_OK);
  EXPECT_EQ(bytes, plan_forward(parse_problem(line)).workspace_bytes());

  Workload data(parse_problem(line), 1);
  plan_forward(data.problem()).execute(data.inputs(), data.outputs());
  const auto expected = results(data);
  data.poison_outputs();
  Views view;
  const fovea_inputs in = to_c(view, data.inputs());
  const fovea_outputs out = to_c(view, data.outputs());
  std::vector<std::byte> memory(bytes + 64);
  void* workspace = memory.data();
  std::size_t space = memory.size();
  ASSERT_EQ(fovea_plan_execute(plan, &in, &out, std::align(64, bytes, workspace, space), nullptr), FOVEA_OK)
      << fovea_last_error();
  EXPECT_EQ(results(data), expected);
  fovea_plan_destroy(plan);
}

TEST(CDoor, DrawsByAnotherSeedThanThePlansWhereOneIsGiven) {
  const std::string line = "fwd+bwd fp32 b2 hq4 hkv2 sq9 skv40 d16 deterministic dropout=0.3 seed=";
  const fovea_dropout_draws other{7, 3};
  const auto run = [&](const std::string& seed, const fovea_dropout_draws* draws, std::size_t size) {
    Workload data(parse_problem(line + seed), 1);
    Views view;
    fovea_inputs in = to_c(view, data.inputs());
    const fovea_outputs out = to_c(view, data.outputs());
    in.size = size;
    in.dropout_draws = draws;
    for (const char* direction : {"fwd", "bwd"}) {
      fovea_plan* plan = nullptr;
      EXPECT_EQ(fovea_plan_from_line((direction + line.substr(7) + seed).c_str(), nullptr, nullptr, &plan), FOVEA_OK);
      EXPECT_EQ(fovea_plan_execute(plan, &in, &out, nullptr, nullptr), FOVEA_OK) << fovea_last_error();
      fovea_plan_destroy(plan);
    }
    return results(data);
  };
  const auto planned = run("7 offset=3", nullptr, sizeof(fovea_inputs));
  EXPECT_EQ(run("1", &other, sizeof(fovea_inputs)), planned);
  EXPECT_NE(run("1", nullptr, sizeof(fovea_inputs)), planned);
  // A program of before there were any, whatever comes behind its struct.
  EXPECT_EQ(run("7 offset=3", reinterpret_cast<const fovea_dropout_draws*>(1), offsetof(fovea_inputs, dropout_draws)),
            planned);
}

TEST(CDoor, DoesNotLookAtTensorsOfTheOtherDirection) {
  Workload data(parse_problem("fwd+bwd fp32 b1 hq2 sq5 d8 sink"), 1);
  Views view;
  const auto* const gone = reinterpret_cast<const fovea_tensor*>(8);  // of a scope that is over
  for (const char* line : {"fwd fp32 b1 hq2 sq5 d8 sink", "bwd fp32 b1 hq2 sq5 d8 sink"}) {
    fovea_inputs in = to_c(view, data.inputs());
    fovea_outputs out = to_c(view, data.outputs());
    if (line[0] == 'f') {
      in.out = in.lse = in.dout = in.dlse = gone;
      out.dq = out.dk = out.dv = out.dbias = out.dalibi_slopes = out.dsink = gone;
    } else {
      out.out = out.lse = gone;
    }
    fovea_plan* plan = nullptr;
    ASSERT_EQ(fovea_plan_from_line(line, nullptr, nullptr, &plan), FOVEA_OK) << fovea_last_error();
    EXPECT_EQ(fovea_plan_execute(plan, &in, &out, nullptr, nullptr), FOVEA_OK) << fovea_last_error();
    fovea_plan_destroy(plan);
  }
}

TEST(CDoor, HonoursTheNamedBackendAndRefusesUnknownOnes) {
  const char* const line = "fwd fp32 b1 hq1 sq4 d8";
  fovea_plan_options options{};
  options.size = sizeof options;
  options.backend = "reference";
  fovea_plan* plan = nullptr;
  ASSERT_EQ(fovea_plan_from_line(line, nullptr, &options, &plan), FOVEA_OK) << fovea_last_error();
  EXPECT_TRUE(contains(fovea_plan_report(plan), "on cpu: reference"));
  fovea_plan_destroy(plan);
  options.backend = "\xff\nnobody";
  EXPECT_EQ(fovea_plan_from_line(line, nullptr, &options, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fovea_last_error(), "'??nobody'"));
  EXPECT_EQ(plan, nullptr);
}

TEST(CStatus, TellsTheUsersErrorFromAnUnsupportedProblem) {
  fovea_plan* plan = nullptr;
  EXPECT_EQ(fovea_plan_from_line("fwd fp32 b1 hq1 sq4 d600", nullptr, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_STREQ(fovea_last_error(), "token 'd600': head_dim (600) must be at most 512");
  EXPECT_EQ(fovea_plan_from_line("fwd+bwd fp32 b1 hq1 sq4 d6", nullptr, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fovea_last_error(), "fwd+bwd"));
  const fovea_device gpu{FOVEA_CUDA, 0, 61};  // older than any that will ever be supported
  EXPECT_EQ(fovea_plan_from_line("fwd fp32 b1 hq1 sq4 d6", &gpu, nullptr, &plan), FOVEA_UNSUPPORTED);
  EXPECT_TRUE(contains(fovea_last_error(), "sm_61"));
}

TEST(CStatus, NamesTheNumberThatIsNoneOfADevice) {
  const auto refused = [](const fovea_device& device, const char* sentence) {
    fovea_plan* plan = nullptr;
    EXPECT_EQ(fovea_explain("fwd fp16 b1 hq1 sq4 d8", &device, nullptr, nullptr, 0, nullptr), FOVEA_INVALID_ARGUMENT);
    EXPECT_STREQ(fovea_last_error(), sentence);
    EXPECT_EQ(fovea_plan_from_line("fwd fp16 b1 hq1 sq4 d8", &device, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
    EXPECT_STREQ(fovea_last_error(), sentence);
  };
  refused({FOVEA_CUDA, -1, 90}, "device index (-1) must be at least 0, where 0 is the first GPU");
  refused({FOVEA_CUDA, 0, -5}, "compute_capability (-5) must be at least 0, where 0 asks the driver");
}

TEST(CStatus, NamesTheValueThatIsNoneOfAnEnum) {
  Workload data(parse_problem("fwd fp32 b1 hq1 sq4 d8"), 1);
  Views view;
  fovea_tensor q = *view(data.inputs().q);
  const fovea_tensor *k = view(data.inputs().k), *v = view(data.inputs().v), *out = view(data.outputs().out);
  fovea_options options{};
  options.size = sizeof options;
  const auto refused = [&](const char* sentence) {
    EXPECT_EQ(fovea_attention_forward(&q, k, v, &options, out, nullptr), FOVEA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(fovea_last_error(), sentence));
  };
  options.causal = 3;
  refused("causal (3)");
  options.causal = 0;
  q.dtype = -1;
  refused("q's dtype (-1)");
  q.dtype = FOVEA_FLOAT32;
  q.rank = 5;
  refused("q's rank (5)");
  q.rank = 4;
  q.device.kind = 2;
  refused("device kind (2)");
  fovea_plan* plan = nullptr;
  q.device.kind = FOVEA_CPU;
  EXPECT_EQ(fovea_plan_from_tensors(2, &q, k, v, nullptr, &plan), FOVEA_INVALID_ARGUMENT);
  EXPECT_TRUE(contains(fovea_last_error(), "direction (2)"));
}

TEST(CSizedStructs, ServeOlderAndNewerHeaders) {
  struct Newer {
    fovea_options known;
    std::int64_t added;
  };
  Workload data(parse_problem("fwd fp32 b1 hq1 sq4 d8"), 1);
  Views view;
  const fovea_tensor *q = view(data.inputs().q), *k = view(data.inputs().k), *v = view(data.inputs().v);
  const fovea_tensor* out = view(data.outputs().out);
  const auto run = [&](const fovea_options* o) { return fovea_attention_forward(q, k, v, o, out, nullptr); };
  Newer newer{};
  newer.known.size = sizeof newer;
  EXPECT_EQ(run(&newer.known), FOVEA_OK) << fovea_last_error();
  newer.added = 1;
  EXPECT_EQ(run(&newer.known), FOVEA_UNSUPPORTED);
  EXPECT_TRUE(contains(fovea_last_error(), "does not know"));

  fovea_options older{};
  older.size = offsetof(fovea_options, backend);  // as if backend had come later
  older.backend = "nobody";
  EXPECT_EQ(run(&older), FOVEA_OK) << fovea_last_error();
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::numeric_limits<std::size_t>::max()}) {
    older.size = size;
    EXPECT_EQ(run(&older), FOVEA_INVALID_ARGUMENT);
    EXPECT_TRUE(contains(fovea_last_error(), "fovea_options"));
  }
}

TEST(CLastError, BelongsToItsThread) {
  fovea_plan* plan = nullptr;
  ASSERT_NE(fovea_plan_from_line("fwd", nullptr, nullptr, &plan), FOVEA_OK);
  const std::string mine = fovea_last_error();
  std::thread([] {
    EXPECT_STREQ(fovea_last_error(), "");
    EXPECT_NE(fovea_explain("bwd fp99", nullptr, nullptr, nullptr, 0, nullptr), FOVEA_OK);
    EXPECT_TRUE(contains(fovea_last_error(), "fp99"));
  }).join();
  EXPECT_EQ(fovea_last_error(), mine);
}

TEST(CLastError, IsCutWhereACharacterBegins) {
  std::string name;
  for (int i = 0; i < 1000; ++i) name += "×…";
  for (const char* shift : {"", "1", "12", "123", "1234"}) {
    setenv("FOVEA_CPU_ISA", (shift + name).c_str(), 1);
    EXPECT_NE(fovea_explain("fwd fp32 b1 hq1 sq1 d1", nullptr, nullptr, nullptr, 0, nullptr), FOVEA_OK);
    unsetenv("FOVEA_CPU_ISA");
    const std::string said = fovea_last_error();
    EXPECT_GE(said.size(), 2045U);
    EXPECT_TRUE(said.ends_with("×") || said.ends_with("…")) << shift;
  }
}

TEST(CExplain, GivesTheLengthAndNeverWritesPastTheCapacity) {
  const char* const line = "bwd bf16 b1 hq2 sq4 d8";
  const std::string report = to_string(explain(parse_problem(line)));
  std::size_t length = 0;
  ASSERT_EQ(fovea_explain(line, nullptr, nullptr, nullptr, 0, &length), FOVEA_OK) << fovea_last_error();
  EXPECT_EQ(length, report.size());
  for (const std::size_t capacity : {std::size_t{1}, std::size_t{10}, length + 1, length + 20}) {
    std::vector<char> text(length + 21, '#');
    ASSERT_EQ(fovea_explain(line, nullptr, nullptr, text.data(), capacity, nullptr), FOVEA_OK);
    EXPECT_EQ(std::string(text.data()), report.substr(0, capacity - 1));
    EXPECT_TRUE(
        std::all_of(text.begin() + static_cast<std::ptrdiff_t>(capacity), text.end(), [](char c) { return c == '#'; }));
  }
}

TEST(CVersion, IsTheLibrarys) { EXPECT_STREQ(fovea_version(), FOVEA_VERSION); }

}  // namespace
}  // namespace fovea
