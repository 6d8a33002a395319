// How the portable forward is cut: what its kernel takes for granted, whatever the problem; and which backward is.
#include "cuda/forward_tuning.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/backward_tuning.h"
#include "cuda/packed_blocks.h"
#include "cuda/params.h"
#include "cuda/requests.h"
#include "cuda/spec.h"
#include "fovea/problem.h"

namespace fovea::cuda {
namespace {

ForwardShape shape_of(const std::string& line, int sm) {
  const auto shape = choose_forward(parse_problem(line), model_of(sm));
  EXPECT_TRUE(shape.has_value()) << line << " on sm_" << sm;
  return shape.value_or(ForwardShape{});
}

TEST(ForwardTuning, EveryWarpHasPairsOfWholeProducts) {
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    for (const char* line_but_dim :
         {"fwd fp32 b1 hq1 sq9", "fwd fp32 b1 hq1 sq2000", "fwd bf16 b1 hq1 sq9", "fwd bf16 b1 hq1 sq500 mask=1hqk",
          "fwd bf16 b1 hq1 sq2000", "fwd fp16 b1 hq1 sq2000 causal=top_left",
          "fwd fp16 b1 hq1 sq2000 bias=1hqk softcap=2 dropout=0.1", "fwd fp32 b1 hq1 sq9 skv2000",
          "fwd bf16 b1 hq1 sq16 skv2000", "fwd bf16 b1 hq8 hkv1 sq4 skv2000 mask=b11k",
          "fwd fp16 b1 hq1 sq64 skv700"}) {
      for (int dim = 1; dim <= 512; dim += dim < 128 ? 7 : 8) {
        const std::string line = line_but_dim + (" d" + std::to_string(dim));
        const ForwardShape shape = shape_of(line, sm);
        const ForwardSpec& s = shape.spec;
        ASSERT_TRUE(!s.in_place || (sm == 75 && dim > 432)) << line << " on sm_" << sm;
        ASSERT_EQ(s.head_dim_v % std::max(16 * s.across, 8 * s.slices), 0) << line << " on sm_" << sm;
        ASSERT_TRUE(s.slices == 1 || s.across == 1) << line << " on sm_" << sm;
        ASSERT_EQ(s.block_m % s.slices, 0) << line << " on sm_" << sm;
        ASSERT_EQ(s.block_n % (16 * s.across), 0) << line << " on sm_" << sm;
        ASSERT_EQ(s.block_m % (16 * s.warps / s.across), 0) << line << " on sm_" << sm;
        ASSERT_GE(std::int64_t{shape.v_chunks} * s.head_dim_v, dim) << line << " on sm_" << sm;
      }
    }
  }
}

TEST(BackwardTuning, HasATileOfEveryHeadDimAndReadsOperandsInPlaceWhereNoOtherFits) {
  for (const int sm : {75, 80, 86, 89, 90, 100, 120}) {
    for (const char* dtype : {"fp32", "fp16", "bf16"}) {
      for (int dim = 1; dim <= 512; dim += dim < 128 ? 7 : 1) {
        const std::string line = std::string("bwd ") + dtype + " b1 hq1 sq99 d" + std::to_string(dim);
        const auto shape = choose_backward(parse_problem(line), model_of(sm));
        ASSERT_TRUE(shape.has_value()) << line << " on sm_" << sm;
        const bool fp32 = shape->spec.type == Type::kFloat32, small = model_of(sm).shared_bytes == 99 * 1024;
        const int widest = sm == 75 ? (fp32 ? 224 : 480) : small && fp32 ? 352 : 512;
        ASSERT_EQ(shape->spec.in_place, dim > widest) << line << " on sm_" << sm;
        ASSERT_GE(shape->spec.head_dim, dim) << line << " on sm_" << sm;
        ASSERT_EQ(name_of(*shape).ends_with(", operands in place"), dim > widest) << line << " on sm_" << sm;
      }
    }
  }
}

TEST(ForwardTuning, HeadsTakeTurnsWhereRowsSeeUnequalNumbersOfKeys) {
  EXPECT_EQ(shape_of("fwd bf16 b4 hq16 sq1024 d64", 90).heads_abreast, 1);
  EXPECT_EQ(shape_of("fwd bf16 b4 hq16 sq1024 d64 causal=top_left", 90).heads_abreast, 64);
  EXPECT_EQ(shape_of("fwd bf16 b4 hq16 sq4096 d128 causal=top_left", 90).heads_abreast, 8);
  EXPECT_EQ(shape_of("fwd bf16 b4 hq16 sq4096 d128 causal=top_left", 86).heads_abreast, 1);
  EXPECT_EQ(shape_of("fwd bf16 b4 hq16 hkv2 sq4096 d128 kvlen=9,9,9,4096", 90).heads_abreast, 64);
}

TEST(ForwardTuning, PartsOfSharedOutColumnsHaveRoomForTheirOwnReferences) {
  const ForwardShape shape = shape_of("fwd bf16 b1 hq1 sq64 skv512 d64 dv512", 90);
  ASSERT_EQ(shape.v_chunks, 2);
  ASSERT_GT(shape.splits, 1);
  EXPECT_EQ(shape.partial_bytes, std::size_t{64} * 2 * shape.splits * (256 + kPartFacts) * sizeof(float));
}

TEST(ForwardTuning, KeysOfFewRowsAreSplitIntoEvenTurnsOfTheMultiprocessors) {
  EXPECT_EQ(shape_of("fwd bf16 b1 hq32 hkv8 sq1 skv65536 d128", 90).splits, 16);  // 128 blocks of 132
  EXPECT_EQ(shape_of("fwd bf16 b16 hq32 hkv8 sq1 skv8192 d128", 90).splits, 1);
  EXPECT_EQ(shape_of("fwd bf16 b20 hq32 hkv8 sq1 skv8192 d128", 90).splits, 4);  // 640 of 660
  EXPECT_EQ(shape_of("fwd bf16 b64 hq32 hkv8 sq1 skv4096 d128", 90).splits, 1);
  EXPECT_EQ(shape_of("fwd bf16 b1 hq8 hkv1 sq1 skv512 d128", 90).spec.slices, 4);
}

TEST(ForwardTuning, KeysOfMoreRowsThanAGridHoldsAreNotSplit) {
  EXPECT_GT(shape_of("fwd bf16 b33554432 hq1 sq32 skv268435456 d8", 90).splits, 1);
  EXPECT_EQ(shape_of("fwd bf16 b33554432 hq2 sq64 skv268435456 d8", 90).splits, 1);
}

/// Whether kernels of forwards of split keys and of whole ones are listed.
std::pair<bool, bool> listed(const std::string& line, int arch) {
  std::pair<bool, bool> found;
  for (const jit::KernelRequest& request : requests(parse_problem(line), Direction::kForward, arch)) {
    if (!request.name.starts_with("forward_") || request.arch_specific) continue;
    (request.unit.find(".split = true") == std::string::npos ? found.second : found.first) = true;
  }
  return found;
}

TEST(ForwardTuning, KernelsAreListedForAnyNumberOfMultiprocessors) {
  using Both = std::pair<bool, bool>;
  for (const int arch : {75, 80, 90, 120}) {
    EXPECT_EQ(listed("fwd fp16 b1 hq32 hkv8 sq1 skv8192 d128", arch), Both(true, true)) << arch;
    EXPECT_EQ(listed("fwd fp16 b1 hq8 sq512 d64 softcap=3", arch), Both(true, true)) << arch;
    EXPECT_EQ(listed("fwd fp16 b1 hq8 sq1 skv16 d64", arch), Both(false, true)) << arch;
    EXPECT_EQ(listed("fwd fp16 b16 hq32 sq4096 d128", arch), Both(false, true)) << arch;
  }
  // Whatever a GPU of an architecture plans is among them.
  for (const char* line : {"fwd bf16 b20 hq32 hkv8 sq1 skv8192 d128", "fwd fp32 b1 hq4 sq300 skv3000 d64"}) {
    std::set<std::string> names;
    for (const jit::KernelRequest& request : requests(parse_problem(line), Direction::kForward, 80))
      names.insert(request.name);
    GpuModel gpu = model_of(80);
    for (gpu.multiprocessors = 4; gpu.multiprocessors <= 128; gpu.multiprocessors += 4) {
      const auto shape = choose_forward(parse_problem(line), gpu);
      ASSERT_TRUE(shape);
      EXPECT_TRUE(names.contains(forward_request(*shape, 80).name)) << gpu.multiprocessors;
      const auto combine = combine_request(shape->spec.type, shape->spec.dropout, shape->by_warps, 80);
      EXPECT_TRUE(shape->splits == 1 || names.contains(combine.name)) << gpu.multiprocessors;
    }
  }
}

TEST(ForwardTuning, NothingIsLaunchedForNoRows) {
  EXPECT_EQ(shape_of("fwd bf16 b2 hq2 sq0 skv8 d64", 90).most_blocks, 0);
  EXPECT_GT(shape_of("fwd bf16 b2 hq2 sq1 skv0 d64", 90).most_blocks, 0);
}

TEST(ForwardTuning, PackedSequencesShareTheBlocksOfAHead) {
  const ForwardShape packed = shape_of("fwd fp32 hq8 hkv2 d64 packed=100+3000+0+7", 90);
  EXPECT_EQ(packed.row_blocks, 3107 / packed.spec.block_m + 4);
  EXPECT_EQ(packed.most_blocks, 8 * packed.row_blocks);
  const ForwardShape one_each = shape_of("fwd bf16 hq32 hkv8 d128 packed_q=1+1+1+1 packed_kv=8192+8192+8192+8192", 90);
  EXPECT_EQ(one_each.splits, shape_of("fwd bf16 b4 hq32 hkv8 sq1 skv8192 d128", 90).splits)
      << "empty blocks are not busy";
  EXPECT_EQ(one_each.row_blocks, 16 / one_each.spec.block_m + 4);
}

TEST(Requests, AreNoneOfProblemsThatNoGpuTakes) {
  for (const int arch : {80, 90}) {
    for (const char* line :
         {"fwd bf16 b1 hq1 sq1 skv4294967296 d64", "fwd bf16 b1 hq1 sq4294967296 skv128 d64",
          "bwd bf16 b4294967296 hq1 sq128 d64 mask=11qk", "bwd bf16 b1 hq1 sq4294967296 d64 deterministic"}) {
      const Problem problem = parse_problem(line);
      EXPECT_TRUE(requests(problem, problem.direction, arch).empty()) << line << " on sm_" << arch;
    }
    EXPECT_FALSE(requests(parse_problem("fwd bf16 b1 hq1 sq1 skv536870912 d64"), Direction::kForward, arch).empty());
  }
}

/// Random sequences, many of them empty: each block has a slot of its own, and what else there is lies past an end.
TEST(PackedBlock, EachBlockOfPackedSequencesHasASlot) {
  std::mt19937 random(28);
  for (const int size : {32, 64, 128}) {
    for (int batch = 1; batch <= 40; ++batch) {
      std::vector<int> begins{0};
      for (int b = 0; b < batch; ++b)
        begins.push_back(begins.back() + (random() % 3 == 0 ? 0 : static_cast<int>(random() % (3U * size))));
      std::set<std::pair<int, int>> found;
      int empty = 0;
      for (int slot = 0; slot < packed_slots(begins.back(), size, batch); ++slot) {
        const auto [b, block] = PackedBlock::of([&](int i) { return begins[i]; }, batch, size, slot);
        const bool there = begins[b] + block * size < begins[b + 1];
        empty += there ? 0 : 1;
        EXPECT_TRUE(!there || found.emplace(b, block).second) << "slot " << slot << " of " << batch << " sequences";
      }
      std::size_t blocks = 0;
      for (int b = 0; b < batch; ++b) blocks += (begins[b + 1] - begins[b] + size - 1) / size;
      EXPECT_EQ(found.size(), blocks) << batch << " sequences in blocks of " << size;
      EXPECT_LE(empty, batch);
    }
  }
}

}  // namespace
}  // namespace fovea::cuda
