// How the Hopper family cuts up a forward pass.
#include <gtest/gtest.h>

#include <string>

#include "cuda/hopper_tuning.h"
#include "cuda/requests.h"
#include "tests/support.h"

namespace fovea::cuda {
namespace {

using test::contains;

ForwardSm90Shape shape_of(const std::string& line) {
  return *choose_forward_sm90(parse_problem(line), model_of(kSm90));
}

TEST(HopperForward, GivesShortRowsTilesThatTheyFill) {
  const auto tile = [](const std::string& line) { return name_of(shape_of(line)); };
  EXPECT_EQ(tile("fwd bf16 b256 hq8 sq64 d64"), "64 rows × 64 keys, 2 stages, 2 of rows, 3 blocks");
  EXPECT_EQ(tile("fwd bf16 b128 hq16 sq77 d64"), "128 rows × 80 keys, 2 stages, 2 of rows, P held, in turns");
  EXPECT_EQ(tile("fwd bf16 b128 hq12 sq197 d64"), "256 rows × 64 keys, 6 stages, 2 of rows, in turns");
  EXPECT_EQ(tile("fwd bf16 b64 hq16 sq64 d128"), "64 rows × 64 keys, 2 stages, 2 of rows, P held, 2 blocks");
  EXPECT_EQ(tile("fwd bf16 b4 hq8 sq2048 d224"), "128 rows × 64 keys, 2 stages, 1 of rows, in turns");
}

TEST(HopperForward, SharesOutTheKeysOfFewTiles) {
  for (const char* line :
       {"fwd bf16 b2 hq8 sq128 skv16384 d128", "fwd bf16 b1 hq32 hkv8 sq256 skv16384 d128 causal=bottom_right",
        "fwd fp16 b1 hq8 sq512 skv8192 d256 mask=b1qk", "fwd bf16 b1 hq1 sq4096 d128"}) {
    const auto shape = shape_of(line);
    EXPECT_TRUE(shape.spec.split) << line;
    EXPECT_LE(shape.tiles, 132) << line << ": one wave";
    EXPECT_GT(shape.tiles, 66) << line << ": of most of the GPU";
  }
  const auto shape = shape_of("fwd bf16 b2 hq8 sq128 skv16384 d128");
  EXPECT_EQ(shape.splits, 8);
  EXPECT_EQ(shape.tiles, 16 * 8);
  EXPECT_EQ(shape.partial_bytes, std::size_t{2} * 8 * 128 * 8 * (128 + 4) * 4) << "O, reference and sum, in fp32";
}

TEST(HopperForward, KeepsKeysTogetherWhereTilesFillTheGpuOrKeysAreFew) {
  for (const char* line : {"fwd bf16 b4 hq16 sq4096 d128", "fwd bf16 b1 hq16 sq2048 d128", "fwd bf16 b1 hq2 sq600 d64",
                           "fwd bf16 b1 hq8 sq512 skv512 d128", "fwd bf16 b1 hq2 sq128 skv0 d64"}) {
    const auto shape = shape_of(line);
    EXPECT_FALSE(shape.spec.split) << line;
    EXPECT_EQ(shape.splits, 1) << line;
    EXPECT_EQ(shape.partial_bytes, 0U) << line;
  }
}

TEST(HopperForward, PacksTheHeadsOfAGroupWhereTilesAreFullerSo) {
  const auto heads = [](const std::string& line) { return shape_of(line).packed_heads; };
  EXPECT_EQ(heads("fwd bf16 b8 hq32 hkv8 sq48 skv4096 d128"), 4);
  EXPECT_EQ(heads("fwd bf16 b8 hq28 hkv4 sq48 skv4096 d128"), 7) << "of eight places one stays empty";
  EXPECT_EQ(heads("fwd bf16 b8 hq32 hkv1 sq16 skv4096 d128"), 16) << "of 32 heads";
  EXPECT_EQ(heads("fwd bf16 b64 hq32 hkv8 sq160 skv160 d128 causal=bottom_right"), 4);
  EXPECT_EQ(heads("fwd bf16 b4 hq28 hkv4 sq4096 d128"), 1) << "an eighth of the rows would stay empty";
  EXPECT_EQ(heads("fwd bf16 b8 hq12 hkv4 sq48 skv2048 d128"), 1)
      << "tiles with one warpgroup's rows, on all of the GPU";
  for (const char* option : {"alibi", "dropout=0.1", "bias=1h1k"})
    EXPECT_EQ(heads("fwd bf16 b8 hq32 hkv8 sq48 skv4096 d128 " + std::string(option)), 1) << option;
  const auto shape = shape_of("fwd bf16 b8 hq28 hkv4 sq48 skv4096 d128");
  EXPECT_TRUE(shape.spec.pack_gqa);
  EXPECT_EQ(shape.row_blocks, 3) << "48 queries of eight places each, in tiles of 128";
}

TEST(HopperForward, LeavesFewRowsToThePortableFamilyWhereItIsFaster) {
  const auto left = [](const std::string& line) { return has_few_rows(parse_problem(line), shape_of(line)); };
  EXPECT_FALSE(left("fwd bf16 b1 hq32 hkv8 sq1 skv8192 d128"));
  EXPECT_TRUE(left("fwd bf16 b1 hq32 hkv8 sq1 skv8192 d256"));
  EXPECT_TRUE(left("fwd bf16 b1 hq8 hkv8 sq16 skv4096 d128"));
  EXPECT_FALSE(left("fwd bf16 b1 hq8 hkv8 sq17 skv4096 d128"));
  EXPECT_TRUE(left("fwd bf16 b1 hq8 hkv8 sq32 skv4096 d128 alibi"));
  EXPECT_FALSE(left("fwd bf16 b1 hq8 hkv8 sq33 skv4096 d128 alibi"));
  EXPECT_TRUE(left("fwd bf16 b8 hq32 hkv8 sq32 skv4096 d128 alibi")) << "whose heads are not packed here";
  EXPECT_FALSE(left("fwd bf16 b8 hq32 hkv8 sq16 skv4096 d128 dropout=0.1"));
  EXPECT_TRUE(left("fwd bf16 b8 hq71 hkv1 sq16 skv2048 d128")) << "whose heads are no product of few";
}

TEST(HopperForward, AsksForTheKernelThatCombinesParts) {
  const auto names = [](const std::string& line) {
    std::string all;
    for (const auto& request : requests(parse_problem(line), Direction::kForward, kSm90)) all += request.name + " ";
    return all;
  };
  EXPECT_TRUE(contains(names("fwd bf16 b2 hq8 sq128 skv16384 d128 dropout=0.1"), "combine_by_warps_bf16_d64_dropout"));
  EXPECT_FALSE(contains(names("fwd bf16 b4 hq16 sq4096 d128"), "combine_by_warps"));
}

}  // namespace
}  // namespace fovea::cuda
