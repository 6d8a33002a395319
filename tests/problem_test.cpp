#include <fovea/problem.h>

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <string>

#include "support.h"

namespace fovea {
namespace {

using test::random_valid_problem;

TEST(Hash, EqualForEqualProblemsAndDifferentForEveryOption) {
  const Problem base = parse_problem("fwd fp16 b2 hq4 hkv2 sq8 skv8 d16");
  EXPECT_EQ(hash(base), hash(Problem(base)));
  std::set<std::uint64_t> hashes{hash(base)};
  const char* const changed[] = {
      "bwd fp16 b2 hq4 hkv2 sq8 d16",
      "fwd bf16 b2 hq4 hkv2 sq8 d16",
      "fwd fp16 b1 hq4 hkv2 sq8 d16",
      "fwd fp16 b2 hq2 hkv2 sq8 d16",
      "fwd fp16 b2 hq4 hkv1 sq8 d16",
      "fwd fp16 b2 hq4 hkv2 sq7 skv8 d16",
      "fwd fp16 b2 hq4 hkv2 sq8 skv7 d16",
      "fwd fp16 b2 hq4 hkv2 sq8 d17 dv16",
      "fwd fp16 b2 hq4 hkv2 sq8 d16 dv17",
      "fwd fp16 hq4 hkv2 d16 packed=8+8",
      "fwd fp16 b2 hq4 hkv2 sq8 d16 packed=random:12",
  };
  for (const char* line : changed) EXPECT_TRUE(hashes.insert(hash(parse_problem(line))).second) << line;
  for (const char* option :
       {"causal=top_left", "causal=bottom_right", "window=1,-",   "window=-,1", "mask=b11k", "mask=11qk",
        "bias=b11k",       "bias=b11k:fp32",      "alibi",        "alibi=b",    "sink",      "softcap=1",
        "scale=1",         "dropout=0.1",         "seed=1",       "offset=1",   "kvlen=8,8", "kvlen=random",
        "qlen=8,8",        "layout=bhsd",         "deterministic"}) {
    Problem p = base;
    parse_options(option, p);
    EXPECT_TRUE(hashes.insert(hash(p)).second) << option;
  }
}

TEST(Hash, TakesNegativeZeroForZeroAsEqualityDoes) {
  Problem a = parse_problem("fwd fp16 b2 hq4 sq8 d16 scale=0"), b = a;
  b.softmax_scale = -0.0F;
  b.softcap = -0.0F;
  EXPECT_EQ(a, b);
  EXPECT_EQ(hash(a), hash(b));
}

TEST(Scale, DefaultsToOneOverTheRootOfHeadDim) {
  EXPECT_FLOAT_EQ(parse_problem("fwd fp32 b1 hq1 sq1 d64").scale(), 0.125F);
  EXPECT_FLOAT_EQ(parse_problem("fwd fp32 b1 hq1 sq1 d64 scale=-3").scale(), -3.0F);
}

TEST(Names, AreThoseOfTheContract) {
  EXPECT_STREQ(name(DType::kFloat32), "fp32");
  EXPECT_STREQ(name(DType::kBFloat16), "bf16");
  EXPECT_EQ(size_bytes(DType::kFloat16), 2);
  EXPECT_EQ(size_bytes(DType::kBool), 1);
  EXPECT_EQ(name(Device{}), "cpu");
  EXPECT_EQ(name(Device{DeviceKind::kCuda, 1, 0}), "cuda:1");
  EXPECT_EQ(name(Device{DeviceKind::kCuda, 0, 90}), "sm_90");
}

double flops_of(const std::string& line) { return flops(parse_problem(line)); }

TEST(Flops, CountAsThePapersDo) {
  const double full = 4.0 * 2 * 16 * 1024 * 2048 * 128;
  const std::string line = " bf16 b2 hq16 hkv4 sq1024 skv2048 d128";
  EXPECT_DOUBLE_EQ(flops_of("fwd" + line), full);
  EXPECT_DOUBLE_EQ(flops_of("bwd" + line), 2.5 * full);
  EXPECT_DOUBLE_EQ(flops_of("fwd+bwd" + line), 3.5 * full);
  EXPECT_DOUBLE_EQ(flops_of("fwd" + line + " causal=top_left"), full / 2);
  EXPECT_DOUBLE_EQ(flops_of("fwd" + line + " causal=bottom_right"), full / 2);
  EXPECT_DOUBLE_EQ(flops_of("fwd" + line + " dv64"), full * 0.75);
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 hq1 d1 packed=3+0+5"), 4.0 * (9 + 25));
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 hq1 d1 packed_q=3+1 packed_kv=7+2"), 4.0 * (21 + 2));
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 b2 hq1 d1 sq4 packed=random:6"), 4.0 * 2 * 9);
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 b1 hq1 d1 sq1 skv3333133365 window=40,-"), 4.0 * 41);  // squares would lose it
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 b2 hq1 d1 sq4 kvlen=1,3"), 4.0 * (4 + 12));
  EXPECT_DOUBLE_EQ(flops_of("fwd fp32 b2 hq1 d1 sq0 skv7"), 0.0);
}

TEST(Flops, CountAWindowOfAnySize) {
  const std::string line = "fwd fp32 b1 hq1 sq90 skv90 d1 window=";
  EXPECT_DOUBLE_EQ(flops_of(line + "288230376151711744,288230376151711744"), 4.0 * 90 * 90);
  EXPECT_DOUBLE_EQ(flops_of(line + "288230376151711744,0"), 4.0 * 90 * 91 / 2);
}

TEST(Flops, CountTheWindowPairByPair) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Problem p = random_valid_problem(seed, 12);
    Problem plain = parse_problem("fwd fp32 b1 hq1 sq1 d1");
    plain.seqlen_q = p.seqlen_q;
    plain.seqlen_kv = p.seqlen_kv;
    plain.causal = p.causal;
    plain.window_left = p.window_left;
    plain.window_right = p.window_right;
    if (!p.window_left && !p.window_right) continue;
    std::int64_t pairs = 0;
    const std::int64_t offset = p.causal == Causal::kTopLeft ? 0 : p.seqlen_kv - p.seqlen_q;
    for (std::int64_t i = 0; i < p.seqlen_q; ++i) {
      for (std::int64_t j = 0; j < p.seqlen_kv; ++j) {
        const std::int64_t after = j - (i + offset);
        const bool hidden = (p.causal != Causal::kNone && after > 0) || (p.window_left && -after > *p.window_left) ||
                            (p.window_right && after > *p.window_right);
        pairs += hidden ? 0 : 1;
      }
    }
    EXPECT_DOUBLE_EQ(flops(plain), 4.0 * static_cast<double>(pairs)) << to_string(plain);
  }
}

}  // namespace
}  // namespace fovea
