#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "tests/emulator/numbers.h"
#include "tests/emulator/warp.h"

// What the emulated GPU promises: it computes, and what a kernel forgets shows.
namespace fovea::emulator {
namespace {

constexpr u32 kWords = 64;

/// A kernel whose one parameter is the address of 64 words.
class Kernel {
 public:
  explicit Kernel(const std::string& body)
      : program_(
            ".version 9.0\n.target sm_90\n.address_size 64\n"
            ".extern .shared .align 16 .b8 shared[];\n"
            ".visible .entry fovea_kernel(.param .u64 fovea_kernel_param_0)\n{\n"
            ".reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .f32 %f<16>;\n.reg .b64 %rd<16>;\n"
            "ld.param.u64 %rd1, [fovea_kernel_param_0];\nmov.u32 %r1, %tid.x;\nmul.wide.u32 %rd2, %r1, 4;\n"
            "add.s64 %rd2, %rd1, %rd2;\nmov.u64 %rd3, shared;\ncvt.u32.u64 %r2, %rd3;\n" +
            body + "ret;\n}\n") {}

  /// The words after a run of one block.
  std::vector<u32> run(u32 threads, u32 seed = 1) {
    Memory memory;
    auto* words = static_cast<u32*>(memory.allocate(kWords * sizeof(u32)));
    for (u32 n = 0; n < kWords; ++n) words[n] = n;
    Launch launch(program_, memory);
    launch.block.x = threads;
    launch.shared_bytes = kWords * sizeof(u32);
    launch.params.resize(sizeof(u64));
    std::memcpy(launch.params.data(), &words, sizeof words);
    launch.lots.seed(seed);
    run_grid(launch, 1);
    return {words, words + kWords};
  }

  /// The values that thread 0's word has in many runs.
  std::set<u32> first_words(u32 threads) {
    std::set<u32> found;
    for (u32 seed = 0; seed < 40; ++seed) found.insert(run(threads, seed)[0]);
    return found;
  }

  std::string fault(u32 threads) {
    try {
      run(threads);
    } catch (const Fault& fault) {
      return fault.what();
    }
    return "none";
  }

 private:
  Program program_;
};

TEST(Emulator, LanesGiveOneAnotherWords) {
  const std::vector<u32> words = Kernel(
                                     "ld.global.u32 %r3, [%rd2];\n"
                                     "shfl.sync.bfly.b32 %r4|%p1, %r3, 5, 31, -1;\n"
                                     "st.global.u32 [%rd2], %r4;\n")
                                     .run(kLanes);
  for (u32 lane = 0; lane < kLanes; ++lane) EXPECT_EQ(words[lane], lane ^ 5U);
}

TEST(Emulator, LanesThatPartMeetAgain) {
  // Odd lanes count to their number in a loop; all of them vote afterwards.
  const std::vector<u32> words = Kernel(
                                     "and.b32 %r3, %r1, 1;\nsetp.eq.s32 %p1, %r3, 0;\nmov.u32 %r4, 0;\n"
                                     "@%p1 bra $after;\n$loop:\nadd.s32 %r4, %r4, 1;\nsetp.lt.u32 %p2, %r4, %r1;\n"
                                     "@%p2 bra $loop;\n$after:\nsetp.ne.s32 %p3, %r4, 0;\n"
                                     "vote.sync.ballot.b32 %r5, %p3, -1;\nadd.s32 %r6, %r5, %r4;\n"
                                     "st.global.u32 [%rd2], %r6;\n")
                                     .run(kLanes);
  for (u32 lane = 0; lane < kLanes; ++lane) EXPECT_EQ(words[lane], 0xaaaaaaaaU + (lane % 2 != 0 ? lane : 0));
}

TEST(Emulator, LanesThatPollLetTheOthersGoOn) {
  const std::vector<u32> words =
      Kernel(
          "setp.eq.s32 %p1, %r1, 0;\n@!%p1 bra $begun;\nmbarrier.init.shared::cta.b64 [%r2], 1;\n"
          "$begun:\nbar.sync 0;\n@%p1 bra $first;\n"
          "{ .reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], 0;\n@!done bra again; }\n"
          "bra $after;\n$first:\nmbarrier.arrive.shared::cta.b64 _, [%r2];\n$after:\nst.global.u32 [%rd2], 7;\n")
          .run(kLanes);
  for (u32 lane = 0; lane < kLanes; ++lane) EXPECT_EQ(words[lane], 7U);
}

TEST(Emulator, RegistersOutliveTextThatComesBeforeTheirs) {
  // The second block of the text runs after the third, whose predicate the last one reads.
  const std::vector<u32> words =
      Kernel(
          "bra $first;\n$second:\nsetp.lt.u32 %p2, %r1, 16;\nselp.u32 %r5, 1, 0, %p2;\nbra $last;\n"
          "$first:\nsetp.eq.u32 %p3, %r1, 3;\nbra $second;\n$last:\nselp.u32 %r6, 10, 0, %p3;\n"
          "add.s32 %r7, %r5, %r6;\nst.global.u32 [%rd2], %r7;\n")
          .run(kLanes);
  for (u32 lane = 0; lane < kLanes; ++lane) EXPECT_EQ(words[lane], (lane < 16 ? 1U : 0U) + (lane == 3 ? 10U : 0U));
}

TEST(Emulator, ATensorCoreAddsUpAndCutsOff) {
  // A and B hold bf16 ones, C 2^24: 16 more fit, one more is half of the last digit and does not.
  const std::string product =
      "mov.u32 %r3, 0x3f803f80;\nmov.f32 %f1, 0f4B800000;\n"
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2, %f3, %f4, %f5}, {%r3, %r3, %r3, %r3}, {%r3, %r3}, "
      "{%f1, %f1, %f1, %f1};\nst.global.f32 [%rd2], %f2;\n";
  EXPECT_EQ(as_float(Kernel(product).run(kLanes)[7]), 16777216.0F + 16.0F);
  EXPECT_EQ(toward_zero(16777216.0 + 1.5), 16777216.0F);
  EXPECT_EQ(toward_zero(-16777216.0 - 1.5), -16777216.0F);
}

constexpr const char* kExchange = "shl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\nst.shared.u32 [%r4], %r1;\n";
constexpr const char* kTakeOther =
    "xor.b32 %r5, %r1, 32;\nshl.b32 %r5, %r5, 2;\nadd.s32 %r5, %r2, %r5;\nld.shared.u32 %r6, [%r5];\n"
    "st.global.u32 [%rd2], %r6;\n";

TEST(Emulator, AMissingBarrierShows) {
  constexpr u32 kGarbage = 0xffffffffU;
  EXPECT_EQ(Kernel(std::string(kExchange) + "bar.sync 0;\n" + kTakeOther).first_words(2 * kLanes), std::set<u32>{32});
  EXPECT_EQ(Kernel(std::string(kExchange) + kTakeOther).first_words(2 * kLanes), (std::set<u32>{32, kGarbage}));
}

TEST(Emulator, ACopyThatNobodyAwaitsShows) {
  const std::string copy =
      "shl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\ncp.async.ca.shared.global [%r4], [%rd2], 4;\n"
      "cp.async.commit_group;\n";
  const std::string take = "ld.shared.u32 %r5, [%r4];\nadd.s32 %r5, %r5, 100;\nst.global.u32 [%rd2], %r5;\n";
  EXPECT_EQ(Kernel(copy + "cp.async.wait_group 0;\n" + take).first_words(kLanes), std::set<u32>{100});
  EXPECT_EQ(Kernel(copy + take).first_words(kLanes), (std::set<u32>{99, 100}));
}

TEST(Emulator, MbarriersOpenWhenAllHaveCome) {
  const std::string begin =
      "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra $begun;\nmbarrier.init.shared::cta.b64 [%r2], 64;\n"
      "$begun:\nbar.sync 0;\nadd.s32 %r7, %r2, 128;\nsetp.ne.s32 %p2, %r1, 40;\n"
      "@%p2 bra $arrive;\nst.shared.u32 [%r7], %r1;\n$arrive:\n"
      "mbarrier.arrive.shared::cta.b64 _, [%r2];\n";
  const std::string wait =
      "{ .reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%r2], 0;\n"
      "@!done bra again; }\n";
  const std::string take = "ld.shared.u32 %r8, [%r7];\nst.global.u32 [%rd2], %r8;\n";
  EXPECT_EQ(Kernel(begin + wait + take).first_words(2 * kLanes), std::set<u32>{40});
  EXPECT_EQ(Kernel(begin + take).first_words(2 * kLanes).count(0xffffffffU), 1U);
}

TEST(Emulator, WhatAGpuWouldRefuseIsNamed) {
  EXPECT_NE(Kernel("ld.global.u32 %r3, [%rd2+256];\n").fault(1).find("4 bytes at 256 of an allocation of 256"),
            std::string::npos);
  EXPECT_NE(Kernel("ld.global.u32 %r3, [%rd2+2];\n").fault(1).find("is no multiple of 4"), std::string::npos);
  EXPECT_NE(Kernel("st.shared.u32 [%r2+256], %r1;\n").fault(1).find("shared memory at 1280 of 1280"),
            std::string::npos);
  EXPECT_NE(Kernel("setp.ne.s32 %p1, %r1, 0;\n@%p1 bra $end;\n$spin:\nld.acquire.gpu.global.s32 %r3, [%rd1];\n"
                   "setp.eq.s32 %p2, %r3, 0;\n@%p2 bra $spin;\n$end:\n")
                .fault(1)
                .find("wait for one another"),
            std::string::npos);
  EXPECT_THROW(Kernel("frobnicate.b32 %r3, %r1;\n"), std::runtime_error);
}

}  // namespace
}  // namespace fovea::emulator
