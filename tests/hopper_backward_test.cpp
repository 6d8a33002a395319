// How the Hopper family cuts up a backward pass: what its kernel takes for granted.
#include <gtest/gtest.h>

#include "cuda/backward_plan_sm90.h"
#include "cuda/hopper_backend.h"
#include "cuda/hopper_backward.h"
#include "cuda/requests.h"
#include "cuda/row_copies.h"
#include "tests/support.h"

namespace fovea::cuda {
namespace {

using test::contains;

BackwardShape shape_of(const std::string& line) {
  const auto shape = choose_backward_sm90(parse_problem(line), model_of(90));
  EXPECT_TRUE(shape.has_value()) << line;
  return shape.value_or(BackwardShape{});
}

TEST(HopperBackward, SaysWhatItDoesNotRun) {
  const auto reasons = [](const std::string& line) {
    const Verdict verdict = make_hopper_backend()->judge(
        parse_problem(line), {.kind = DeviceKind::kCuda, .index = 0, .compute_capability = 90});
    std::string all;
    for (const std::string& reason : verdict.reasons) all += reason + "; ";
    return all;
  };
  for (const char* line : {
           "bwd bf16 b2 hq8 hkv2 sq512 d128 causal=bottom_right",
           "bwd fp16 b1 hq4 sq100 skv300 d40 dv128 window=16,8 sink",
           "bwd bf16 b2 hq2 sq64 d64 alibi dropout=0.1 kvlen=1,60",
           "bwd bf16 hq2 d96 packed=100+200 dropout=0.1",
           "bwd fp16 b1 hq2 sq300 d48 mask=b1qk softcap=20 alibi dropout=0.1 deterministic",
           "bwd bf16 b1 hq2 sq300 d128 mask=b1qk",
           "bwd bf16 b1 hq2 sq300 d96 mask=1hqk dropout=0.1 sink",
           "bwd bf16 b1 hq8 hkv2 sq16 skv4096 d128 deterministic",
           "bwd bf16 b1 hq2 sq512 d64 bias=11qk mask=b1qk softcap=20 alibi dropout=0.1 deterministic",
           "bwd fp16 b1 hq2 sq300 d128 bias=1hqk:fp32",
           "bwd bf16 b1 hq2 sq300 d128 bias=bh1k mask=b1qk dropout=0.1",
           "bwd bf16 b1 hq2 sq300 d256 bias=1hqk:fp32",
           "bwd bf16 b1 hq1 sq512 d256 mask=11qk softcap=20 dropout=0.1 deterministic",
           "bwd bf16 b1 hq1 sq512 d128 bias=11qk mask=11qk alibi softcap=20 dropout=0.1",
       }) {
    EXPECT_EQ(reasons(line), "") << line;
  }
  for (const auto& [line, why] : {
           std::pair{"bwd fp32 b1 hq1 sq512 d64", "not fp32"},
           std::pair{"bwd bf16 b1 hq1 sq512 d264 dv64", "head_dim (264) is above 256"},
           std::pair{"bwd bf16 b1 hq1 sq512 d136 softcap=20 alibi", "no tile of head_dim 136"},
           std::pair{"bwd bf16 b1 hq1 sq512 d128 bias=11qk:fp32 mask=11qk", "no tile of head_dim 128"},
       }) {
    EXPECT_TRUE(contains(reasons(line), why)) << line << ": " << reasons(line);
  }
}

TEST(HopperBackward, EveryTileOfSharedMemoryBeginsWhereASwizzleDoes) {
  constexpr int kSwizzle = 1024, kMost = 227 * 1024;
  for (const int d : {8, 40, 64, 72, 96, 128, 136, 192, 256}) {
    for (const int dv : {16, 64, 80, 128, 256}) {
      for (const char* option : {"", " mask=b1qk", " dropout=0.5", " bias=1hqk", " bias=1hqk:fp32"}) {
        const std::string line = "bwd bf16 b1 hq2 sq300 d" + std::to_string(d) + " dv" + std::to_string(dv) + option;
        const BackwardSpec spec = shape_of(line).spec;
        const BackwardSm90Shared at = BackwardSm90Shared::of(spec);
        for (const int place : {at.k, at.v, at.other_k, at.q, at.q_stage, at.dout, at.dout_stage, at.ds, at.ds_stage,
                                at.other_ds, at.bias, at.bias_stage})
          EXPECT_EQ(place % kSwizzle, 0) << line;
        EXPECT_EQ(at.dq % 16, 0) << line;
        EXPECT_EQ(at.statistics % 16, 0) << line;
        EXPECT_EQ(at.statistics_of_tile % 16, 0) << line;
        EXPECT_EQ(at.words_stage * 8, spec.mask ? spec.block_m * keys_of_block(spec) : 0) << line;
        EXPECT_LE(at.total, kMost) << line;
      }
    }
  }
}

TEST(HopperBackward, WarpgroupsShareTheRegistersOfAMultiprocessor) {
  constexpr int kAll = 65536 / 128;
  for (const char* line :
       {"bwd bf16 b1 hq2 sq300 d64", "bwd bf16 b1 hq2 sq300 d64 dropout=0.1", "bwd bf16 b1 hq2 sq300 d128",
        "bwd bf16 b1 hq2 sq300 d128 mask=b1qk", "bwd bf16 b1 hq2 sq300 d48 mask=b1qk deterministic"}) {
    const BackwardSpec spec = shape_of(line).spec;
    const int consumers = consumer_registers(spec), producer = producer_registers(spec), dq = dq_registers(spec);
    EXPECT_LE(kBackwardConsumers * consumers + producer + dq, kAll) << line;
    for (const int registers : {consumers, producer, dq}) EXPECT_EQ(registers % 8, 0) << line;
    EXPECT_GE(dq, 64) << line << ": ptxas wants as many for 32 accumulators";
  }
}

TEST(HopperBackward, SixteenRowsOfDqLieInRunsOfPieces) {
  // What a warp adds at once begins where the kernel says and is as long as it says.
  for (const int d : {16, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256}) {
    const BackwardSpec spec = shape_of("bwd bf16 b1 hq2 sq300 d" + std::to_string(d)).spec;
    const WarpGrid grid = WarpGrid::of(spec.block_m, spec.head_dim, spec.warps);
    const int m = grid.rows / 16, n = grid.columns / 8;
    const int together = dq_columns(spec) / 8, run = m == 1 ? together : std::min(n & -n, together);
    ASSERT_TRUE(m > 0 && n > 0 && together > 0) << d;
    EXPECT_EQ(together % run, 0) << d;
    const auto piece = [&](int i, int j) { return ((i / m * grid.across + j / n) * m + i % m) * n + j % n; };
    for (int i = 0; i < spec.block_m / 16; ++i) {
      for (int j = 0; j < spec.head_dim / 8; ++j) {
        const int first = j / together * together + j % together / run * run;
        EXPECT_EQ(piece(i, j), piece(i, first) + j - first) << d;
      }
    }
  }
}

TEST(HopperBackward, WideHeadsArePairsOfBlocksThatShareDq) {
  const auto unit = [](const std::string& line) { return backward_sm90_request(shape_of(line)).unit; };
  EXPECT_TRUE(contains(unit("bwd bf16 b1 hq2 sq300 d136"), "__cluster_dims__(2)"));
  EXPECT_FALSE(contains(unit("bwd bf16 b1 hq2 sq300 d128"), "__cluster_dims__"));
  const BackwardShape wide = shape_of("bwd bf16 b1 hq2 sq300 skv300 d64 dv256");
  EXPECT_EQ(wide.key_blocks, 3) << "of 128 keys, a pair's";
  EXPECT_EQ(keys_of_block(wide.spec) * blocks_of_cluster(wide.spec), wide.spec.block_n);
  EXPECT_GE(wide.most_blocks, 2 * 3 * 2);
}

TEST(HopperBackward, HeadsTakeTurnsUnderABandOrWhereDqDoesAndInWholeGroups) {
  EXPECT_EQ(shape_of("bwd bf16 b3 hq8 hkv8 sq4096 d128").heads_abreast, 1);
  EXPECT_EQ(shape_of("bwd bf16 b3 hq8 hkv8 sq4096 d128 causal=top_left").heads_abreast, 4);
  EXPECT_EQ(shape_of("bwd bf16 b1 hq17 sq4096 d128 causal=top_left").heads_abreast, 1);
  EXPECT_EQ(shape_of("bwd bf16 b3 hq8 hkv8 sq4096 d128 deterministic").heads_abreast, 8) << "as many as L2 holds";
  EXPECT_EQ(shape_of("bwd bf16 b1 hq8 hkv8 sq16384 d128 deterministic").heads_abreast, 2) << "likewise";
  EXPECT_EQ(shape_of("bwd bf16 b1 hq8 hkv2 sq16384 d128 deterministic").heads_abreast, 1) << "with rows of four heads";
  EXPECT_EQ(shape_of("bwd bf16 b4 hq16 hkv16 sq512 d128 deterministic").heads_abreast, 32)
      << "as many as begin together";
  EXPECT_EQ(shape_of("bwd bf16 b4 hq16 hkv16 sq512 d256 deterministic").heads_abreast, 16) << "likewise, of pairs";
}

TEST(HopperBackward, PackedSequencesShareTheLinesOfAKvHead) {
  const BackwardShape packed = shape_of("bwd bf16 hq2 d128 packed=100+3000+0+7 causal=bottom_right");
  EXPECT_EQ(packed.key_lines, 3107 / 128 + 4);
  EXPECT_EQ(packed.turns, 2) << "not one for each sequence";
  EXPECT_EQ(packed.heads_abreast, 2);
  EXPECT_EQ(packed.row_slots, 3107 / 64 + 4);
  const BackwardShape batch = shape_of("bwd bf16 b3 hq2 sq300 d128");
  EXPECT_EQ(batch.key_lines, batch.key_blocks);
  EXPECT_EQ(batch.turns, 6);
}

TEST(HopperBackward, SharesOutGroupsOfHeadsWhereBlocksAreFew) {
  const auto parts = [](const std::string& line) { return shape_of(line).group_parts; };
  EXPECT_GT(parts("bwd bf16 b2 hq32 hkv1 sq2048 d128 causal=bottom_right"), 4);
  EXPECT_EQ(parts("bwd bf16 b2 hq28 hkv4 sq2048 d128 causal=bottom_right"), 7);
  EXPECT_EQ(parts("bwd bf16 b2 hq32 hkv8 sq8192 d128 causal=bottom_right"), 1) << "blocks are many";
  EXPECT_EQ(parts("bwd bf16 b1 hq2 sq2048 d128"), 1) << "no group";
  const BackwardShape split = shape_of("bwd bf16 b3 hq8 hkv2 sq300 d128");
  EXPECT_TRUE(split.spec.split_gqa);
  EXPECT_EQ(split.turns, 3 * 2 * split.group_parts) << "each part is a kv head to the kernel";
}

TEST(HopperBackward, HoldsDqWhereBlocksOfAllKeysFillTheGpu) {
  const auto held = [](const std::string& line) { return shape_of(line).spec.holds_dq; };
  EXPECT_TRUE(held("bwd bf16 b32 hq32 sq512 d64"));
  EXPECT_TRUE(held("bwd bf16 b32 hq32 hkv8 sq128 d64 causal=top_left dropout=0.1")) << "512 rows read a kv head";
  EXPECT_TRUE(held("bwd bf16 b32 hq16 sq512 skv4096 d64 dropout=0.1")) << "by the tile it would have anyway";
  EXPECT_FALSE(held("bwd bf16 b32 hq16 sq512 skv4096 d64")) << "by a smaller one";
  EXPECT_FALSE(held("bwd bf16 b32 hq32 sq513 d64")) << "no room";
  EXPECT_FALSE(held("bwd bf16 b32 hq32 sq128 d72")) << "more than a panel";
  EXPECT_FALSE(held("bwd bf16 b8 hq12 sq512 d64")) << "96 blocks for 132 multiprocessors";
  EXPECT_FALSE(held("bwd bf16 b8 hq18 sq512 d64")) << "144 of them, which leave most idle in the end";
  const BackwardShape plain = shape_of("bwd bf16 b32 hq32 sq512 d64"),
                      ordered = shape_of("bwd bf16 b32 hq32 sq512 d64 deterministic");
  EXPECT_EQ(plain.spec, ordered.spec) << "dq has one order anyway";
  EXPECT_EQ(plain.workspace_bytes, 2U * 32 * 32 * 512 * 4) << "log2_lse and delta alone";
  EXPECT_EQ(requests(parse_problem("bwd bf16 b32 hq32 sq512 d64"), Direction::kBackward, 90).size(), 5U)
      << "rows and main; and the portable kernels' three";
}

TEST(HopperBackward, EndsDqInPlacesThatHeadsTakeOneAfterTheOther) {
  const BackwardShape many = shape_of("bwd bf16 b32 hq16 sq512 d128");
  EXPECT_TRUE(many.spec.ends_dq);
  EXPECT_TRUE(many.spec.goes_on);
  EXPECT_EQ(many.dq_lag, 43) << "five quarters of 132 blocks of 4 a head, and a head";
  EXPECT_EQ(many.dq_places, 43 + 34);
  EXPECT_EQ(many.dq_parts, 1);
  const BackwardShape longer = shape_of("bwd bf16 b16 hq16 sq1024 d128");
  EXPECT_FALSE(longer.spec.goes_on) << "beginnings and ends are little of its time";
  EXPECT_EQ(longer.dq_lag, 18) << "132 blocks of 8 a head, and a head";
  EXPECT_EQ(longer.dq_places, 18 + 6);
  EXPECT_LT(longer.workspace_bytes, 16U << 20);
  EXPECT_LT(many.workspace_bytes, 24U << 20) << "places for a wave more, as blocks know their next task";
  EXPECT_EQ(shape_of("bwd bf16 b4 hq16 sq4096 d128").dq_parts, 4);
  EXPECT_EQ(shape_of("bwd bf16 b4 hq16 sq4096 d128 causal=top_left").dq_lag % 4, 0) << "whole groups of heads";
  EXPECT_TRUE(shape_of("bwd bf16 b102 hq1 sq512 d128").spec.ends_dq);
  EXPECT_FALSE(shape_of("bwd bf16 b101 hq1 sq512 d128").spec.ends_dq) << "fewer than three times 34 heads";
  for (const char* ragged : {"bwd bf16 b32 hq16 sq512 d128 kvlen=random", "bwd bf16 b32 hq16 sq512 d128 qlen=random",
                             "bwd bf16 hq200 d128 packed=512+512"}) {
    EXPECT_FALSE(shape_of(ragged).spec.ends_dq) << ragged;
  }
  EXPECT_FALSE(shape_of("bwd bf16 b32 hq32 sq512 d64").spec.ends_dq) << "it is held";
  EXPECT_FALSE(shape_of("bwd bf16 b1 hq2 sq0 skv300 d128").spec.ends_dq) << "nothing is cleared without rows";
  for (const char* line :
       {"bwd bf16 b40 hq4 sq9 skv260 d128", "bwd fp16 b50 hq4 sq9 skv260 d136 causal=bottom_right deterministic",
        "bwd fp16 b40 hq4 hkv4 sq9 skv260 d64 causal=bottom_right"}) {
    EXPECT_TRUE(shape_of(line).spec.ends_dq) << line << ", of the problem list";
  }
}

TEST(HopperBackward, BlocksGoOnWhereRowsAreFewAndThereIsRoomForTheNextKeys) {
  for (const char* line :
       {"bwd bf16 b16 hq12 sq16 skv2048 d64", "bwd bf16 b16 hq32 sq1024 d64", "bwd bf16 b43 hq4 sq9 skv260 d128",
        "bwd fp16 b16 hq12 hkv6 sq100 skv2048 d64 dropout=0.1 softcap=5 mask=b1qk"}) {
    const BackwardShape shape = shape_of(line);
    EXPECT_TRUE(shape.spec.goes_on) << line;
    EXPECT_LE(BackwardSm90Shared::of(shape.spec).total, kMostShared) << line;
    EXPECT_EQ(BackwardSm90Shared::of(shape.spec).k_places, 2) << line;
  }
  for (const char* line :
       {"bwd bf16 b16 hq32 sq1025 d64", "bwd bf16 b32 hq16 sq512 d128 deterministic",
        "bwd bf16 b32 hq16 sq512 d128 bias=1hqk", "bwd bf16 b32 hq16 sq512 d128 alibi", "bwd bf16 b32 hq16 sq512 d96",
        "bwd bf16 b32 hq16 sq512 d160", "bwd bf16 b40 hq4 sq9 skv260 d128"}) {
    EXPECT_FALSE(shape_of(line).spec.goes_on) << line;
    EXPECT_EQ(BackwardSm90Shared::of(shape_of(line).spec).k_places, 1) << line;
  }
}

TEST(HopperBackward, PrecompilesItsOwnMainKernelAndThePortableOnesAroundIt) {
  const Problem problem = parse_problem("bwd bf16 b40 hq4 sq300 d128 causal=top_left sink");
  const auto all = requests(problem, Direction::kBackward, 90);
  ASSERT_EQ(all.size(), 7U) << "main, rows and sums, for both families, and queries for the portable one";
  EXPECT_EQ(all[0].name, "backward_sm90_bf16_d128_ends_dq_band");
  EXPECT_EQ(jit::target_of(all[0]), "sm_90a");
  EXPECT_EQ(all[0].threads, 512);
  EXPECT_TRUE(contains(all[0].unit, "m64n128k16")) << "dv and dk";
  EXPECT_TRUE(contains(all[0].unit, "m64n64k16")) << "S, dP and dq";
  EXPECT_EQ(requests(problem, Direction::kBackward, 80).size(), 4U);
}

TEST(HopperBackward, SequencesThatShareABiasTakeTurnsInnermost) {
  const auto shared = shape_of("bwd bf16 b4 hq8 sq4096 d128 bias=1hqk"),
             own = shape_of("bwd bf16 b4 hq8 sq4096 d128 bias=bhqk");
  EXPECT_TRUE(shared.batch_inside);
  EXPECT_EQ(shared.heads_abreast, 4);
  EXPECT_FALSE(own.batch_inside);
  EXPECT_EQ(own.heads_abreast, 1);
  EXPECT_EQ(shape_of("bwd bf16 b1 hq8 sq4096 d128 bias=11qk").heads_abreast, 4);
}

TEST(HopperBackward, HasAKernelForTheGradientOfABiasOfItsOwnKeys) {
  const auto request = [](const std::string& line) {
    return bias_gradient_sm90_request(parse_problem(line), shape_of(line));
  };
  const auto made = request("bwd bf16 b2 hq2 sq300 d128 bias=1hqk dropout=0.1 deterministic");
  ASSERT_TRUE(made.has_value());
  EXPECT_EQ(made->name, "bias_gradient_sm90_bf16_d128_m128_bias_bias_type_bf16_dropout");
  EXPECT_LE(made->shared_bytes, 227 * 1024);
  for (const char* line :
       {"bwd bf16 b2 hq2 sq300 d128 bias=1hqk:fp32", "bwd bf16 b2 hq2 sq300 d128 bias=1hqk mask=b1qk",
        "bwd bf16 b2 hq2 sq300 d256 bias=1hqk", "bwd fp16 b2 hq2 sq300 d256 bias=1hqk:fp32 mask=b1qk",
        "bwd bf16 b2 hq2 sq300 d128 bias=1h1k", "bwd fp16 b2 hq2 sq300 d64 bias=111k:fp32"}) {
    EXPECT_TRUE(request(line).has_value()) << line;
  }
  for (const char* line : {"bwd bf16 b2 hq2 sq300 d128", "bwd bf16 b2 hq2 sq300 d128 bias=1hq1"}) {
    EXPECT_FALSE(request(line).has_value()) << line;
  }
}

TEST(HopperBackward, SharesOutLongWalksOfFewTilesOfABiasGradient) {
  EXPECT_EQ(shape_of("bwd bf16 b16 hq16 sq512 d128 bias=1hqk").bias_parts, 1);
  for (const char* line : {"bwd bf16 b16 hq4 sq64 d64 bias=1hqk", "bwd bf16 b16 hq16 sq512 d128 bias=11qk",
                           "bwd fp16 b64 hq2 sq1000 d64 bias=11qk", "bwd bf16 b4 hq8 sq4096 d128 bias=b11k"})
    EXPECT_GT(shape_of(line).bias_parts, 1) << line;
}

TEST(HopperBackward, CopiesABiasThatTheCopyEngineCannotRead) {
  const auto copies = [](const std::string& line) { return copies_bias(parse_problem(line)); };
  EXPECT_TRUE(copies("bwd bf16 b2 hq2 sq300 skv77 d64 bias=1hqk"));
  EXPECT_TRUE(copies("fwd bf16 b2 hq2 sq300 skv84 d64 bias=b11k"));
  EXPECT_TRUE(copies("fwd bf16 b2 hq2 sq300 skv82 d64 bias=11qk:fp32"));
  EXPECT_FALSE(copies("fwd bf16 b2 hq2 sq300 skv84 d64 bias=11qk:fp32"));
  EXPECT_FALSE(copies("bwd bf16 b2 hq2 sq300 skv80 d64 bias=1hqk"));
  EXPECT_FALSE(copies("bwd bf16 b2 hq2 sq300 skv77 d64 bias=1hq1")) << "keys that are no neighbours";
  EXPECT_FALSE(copies("bwd bf16 b2 hq2 sq300 skv77 d64"));
  const AlignedBias copied(parse_problem("fwd bf16 b3 hq2 sq5 skv77 d64 bias=1hqk"), 100,
                           Device{DeviceKind::kCuda, 0, kSm90});
  EXPECT_EQ(copied.workspace_bytes(), 128 + 2 * 5 * 160) << "behind 100 bytes, rows of 154 bytes 160 apart";
}

TEST(HopperBackward, PadsHeadDimsThatAreNoWholePieces) {
  const Problem wide = padded(parse_problem("bwd bf16 b4 hq8 sq2048 d100 dv33"));
  EXPECT_EQ(wide.head_dim, 104);
  EXPECT_EQ(wide.head_dim_v, 40);
  EXPECT_FLOAT_EQ(wide.scale(), 0.1F) << "of the head dim as given";
  EXPECT_EQ(padded(parse_problem("fwd fp32 b4 hq8 sq2048 d50")).head_dim, 52);
  for (const char* line : {"fwd bf16 b4 hq8 sq2048 d40", "fwd fp32 b4 hq8 sq2048 d100", "fwd bf16 b1 hq2 sq64 d33"})
    EXPECT_EQ(padded(parse_problem(line)), parse_problem(line)) << line;
}

TEST(HopperBackward, CompilesForRacecheckWhereItIsAskedTo) {
  const auto unit = [] { return backward_sm90_request(shape_of("bwd bf16 b1 hq2 sq300 d128")).unit; };
  EXPECT_FALSE(contains(unit(), "FOVEA_RACECHECK"));
  ASSERT_EQ(setenv("FOVEA_RACECHECK", "1", 1), 0);
  EXPECT_TRUE(contains(unit(), "#define FOVEA_RACECHECK"));
  unsetenv("FOVEA_RACECHECK");
}

}  // namespace
}  // namespace fovea::cuda
