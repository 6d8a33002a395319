// How what flows into the gradient of a bias is shared out to the blocks of a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cuda/backward_plan.h"
#include "cuda/backward_tuning.h"
#include "cuda/hopper_backward.h"
#include "cuda/requests.h"

namespace fovea::cuda {
namespace {

constexpr int kArchs[] = {75, 80, 86, 89, 90, 100, 120};

BackwardShape portable(const std::string& line, int sm) {
  const auto shape = choose_backward(parse_problem(line), model_of(sm));
  EXPECT_TRUE(shape.has_value()) << line << " on sm_" << sm;
  return shape.value_or(BackwardShape{});
}

TEST(BiasGradient, TilesThatAreFewAreWalkedByAsManyBlocksAsThereIsRoomFor) {
  const auto parts = [](const std::string& bias) {
    const auto shape = choose_backward_sm90(parse_problem("bwd bf16 b16 hq16 sq512 d128 bias=" + bias), model_of(90));
    return shape ? shape->bias_parts : 0;
  };
  EXPECT_EQ(parts("111k"), 66) << "8 tiles, 132 multiprocessors, 2 blocks on each and 2 turns of them";
  EXPECT_EQ(parts("11q1"), 66);
  EXPECT_EQ(parts("b11k"), 4);
  EXPECT_EQ(parts("1h1k"), 4);
  EXPECT_EQ(parts("1111"), 528);
  EXPECT_EQ(parts("11qk"), 8);
  for (const char* many : {"bhqk", "1hqk", "b1qk", "bh1k"}) EXPECT_EQ(parts(many), 1) << many;
}

TEST(BiasGradient, PartsHaveStepsOfTheirOwnAndAnEvenNumberOfTurns) {
  for (const int sm : kArchs) {
    const std::int64_t multiprocessors = model_of(sm).multiprocessors;
    for (const std::string dims : {"fp16 b16 hq16 sq512 d64", "bf16 b2 hq4 sq300 d128 dropout=0.1",
                                   "fp32 b4 hq4 sq1000 d64", "fp16 b3 hq2 sq200 d256", "fp16 b64 hq2 sq90 d96"}) {
      for (const auto& [bias, tiles_of] :
           {std::pair{"1111", "----"}, std::pair{"111k", "---k"}, std::pair{"11q1", "--q-"}, std::pair{"1hq1", "-hq-"},
            std::pair{"11qk", "--qk"}}) {
        const std::string line = "bwd " + dims + " bias=" + bias + ":fp32", of = tiles_of;
        const Problem problem = parse_problem(line);
        const BackwardShape shape = portable(line, sm);
        const BackwardSpec cut = bias_gradient_spec(shape.spec);
        const auto count = [&](char own, std::int64_t many) { return of.find(own) == std::string::npos ? 1 : many; };
        const std::int64_t rows = ceil_div(problem.seqlen_q, cut.block_m),
                           keys = ceil_div(problem.seqlen_kv, cut.block_n),
                           all = problem.batch * problem.num_q_heads * rows * keys,
                           tiles = count('h', problem.num_q_heads) * count('q', rows) * count('k', keys);
        SCOPED_TRACE(line + " on sm_" + std::to_string(sm));
        if (shape.bias_parts == 1) {
          EXPECT_GE(tiles, multiprocessors);
          continue;
        }
        EXPECT_LE(shape.bias_parts * tiles * 2, all) << "at least two steps each";
        EXPECT_LE(shape.bias_parts * tiles, multiprocessors * 2 * 4) << "what fits, in two turns";
        const std::int64_t entries = (of[2] == 'q' ? cut.block_m : 1) * (of[3] == 'k' ? cut.block_n : 1);
        EXPECT_GE(shape.workspace_bytes - shape.bias_sums,
                  static_cast<std::size_t>(shape.bias_parts * tiles * entries) * sizeof(float));
      }
    }
  }
}

TEST(BiasGradient, PartsTakeNoMoreOfTheWorkspaceForLongerSequences) {
  for (const int sm : kArchs) {
    for (const char* bias : {"1111", "111k", "bhq1", "11qk", "1hqk"}) {
      for (int power = 6; power <= 17; ++power) {
        const std::string line = "bwd fp16 b4 hq4 sq" + std::to_string(1 << power) + " d64 bias=" + bias;
        const BackwardShape shape = portable(line, sm);
        EXPECT_LE(shape.workspace_bytes - shape.bias_sums, std::size_t{24} << 20) << line << " on sm_" << sm;
      }
    }
  }
}

TEST(BiasGradient, IsOneKernelWhereNothingIsWonByMore) {
  for (const char* line : {"bwd bf16 b16 hq16 sq512 d64 bias=bhqk", "bwd bf16 b1 hq1 sq64 d64 bias=111k",
                           "bwd bf16 b3 hq1 sq64 d64 bias=1h1k", "bwd bf16 b2 hq2 sq0 skv64 d64 bias=1111",
                           "bwd bf16 b2 hq2 sq0 skv64 d64 bias=11qk", "bwd bf16 b2 hq2 sq512 d64"}) {
    const BackwardShape shape = portable(line, 80);
    EXPECT_EQ(shape.bias_parts, 1) << line;
    EXPECT_EQ(shape.workspace_bytes, shape.bias_sums) << line;
  }
}

TEST(BiasGradient, WhatAddsUpPartsIsListedForAnyNumberOfMultiprocessors) {
  const auto listed = [](const std::string& line, int arch) {
    return std::ranges::any_of(requests(parse_problem(line), Direction::kBackward, arch),
                               [](const auto& request) { return request.name.starts_with("bias_sums_"); });
  };
  for (const int arch : {75, 80, 90, 120}) {
    for (const char* line : {"bwd fp16 b16 hq16 sq512 d64 bias=111k", "bwd fp16 b4 hq16 sq512 d64 bias=1hqk",
                             "bwd fp16 b4 hq4 sq512 d64 bias=b1qk", "bwd fp16 b16 hq16 sq4096 d64 bias=1hqk"}) {
      bool planned = false;
      GpuModel gpu = model_of(arch);
      for (gpu.multiprocessors = 4; gpu.multiprocessors <= 192; gpu.multiprocessors += 4) {
        const auto shape = choose_backward(parse_problem(line), gpu);
        ASSERT_TRUE(shape);
        planned = planned || shape->bias_parts > 1;
      }
      EXPECT_EQ(listed(line, arch), planned) << line << " on sm_" << arch;
    }
  }
}

}  // namespace
}  // namespace fovea::cuda
