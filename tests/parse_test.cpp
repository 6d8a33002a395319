#include <fovea/problem.h>

#include <gtest/gtest.h>

#include <clocale>
#include <locale>
#include <random>
#include <string>

#include "support.h"

namespace fovea {
namespace {

using test::contains;
using test::random_valid_problem;
using test::refusal;

std::string canonical(const std::string& line) { return to_string(parse_problem(line)); }
std::string why_not(const std::string& line) {
  return refusal([&] { (void)parse_problem(line); });
}

TEST(Line, FillsInDefaultsAndPrintsInOneOrder) {
  EXPECT_EQ(canonical("fwd bf16 b2 hq16 sq1024 d128"), "fwd bf16 b2 hq16 hkv16 sq1024 skv1024 d128");
  EXPECT_EQ(canonical("  bwd\tfp16  d64 sq3 hq4 b1 dv64 hkv2\n"), "bwd fp16 b1 hq4 hkv2 sq3 skv3 d64");
  EXPECT_EQ(canonical("fwd+bwd fp32 b1 hq1 sq1 d8 deterministic sink causal=top_left window=-,-"),
            "fwd+bwd fp32 b1 hq1 hkv1 sq1 skv1 d8 causal=top_left sink deterministic");
  EXPECT_EQ(canonical("fwd fp32 b1 hq1 sq1 d8 dropout=0.10 scale=1e-1 softcap=30.0 seed=0 offset=0"),
            "fwd fp32 b1 hq1 hkv1 sq1 skv1 d8 softcap=30 scale=0.1 dropout=0.1");
  EXPECT_EQ(canonical("fwd fp16 hq1 d8 packed_q=1+2 packed_kv=1+2 bias=1hqk:fp16"),
            "fwd fp16 hq1 hkv1 d8 packed=1+2 bias=1hqk");
}

TEST(Line, SaysEveryOptionOfTheContract) {
  const Problem p = parse_problem(
      "bwd fp16 b3 hq4 hkv2 sq5 skv7 d8 dv16 causal=bottom_right window=256,- mask=b11k bias=1hqk:fp32 alibi=b sink "
      "softcap=30 scale=-0.125 dropout=0.1 seed=18446744073709551615 offset=9 kvlen=7,0,3 qlen=random layout=bhsd "
      "deterministic");
  EXPECT_EQ(p.direction, Direction::kBackward);
  EXPECT_EQ(p.dtype, DType::kFloat16);
  EXPECT_EQ(p.batch, 3);
  EXPECT_EQ(p.num_q_heads, 4);
  EXPECT_EQ(p.num_kv_heads, 2);
  EXPECT_EQ(p.seqlen_q, 5);
  EXPECT_EQ(p.seqlen_kv, 7);
  EXPECT_EQ(p.head_dim, 8);
  EXPECT_EQ(p.head_dim_v, 16);
  EXPECT_EQ(p.causal, Causal::kBottomRight);
  EXPECT_EQ(p.window_left, 256);
  EXPECT_EQ(p.window_right, std::nullopt);
  EXPECT_EQ(p.mask, (Extent{.batch = true, .heads = false, .queries = false, .keys = true}));
  EXPECT_EQ(p.bias, (Extent{.batch = false, .heads = true, .queries = true, .keys = true}));
  EXPECT_EQ(p.bias_dtype, DType::kFloat32);
  EXPECT_EQ(p.alibi, Alibi::kPerBatchAndHead);
  EXPECT_TRUE(p.sink);
  EXPECT_EQ(p.softcap, 30.0F);
  EXPECT_EQ(p.softmax_scale, -0.125F);
  EXPECT_EQ(p.dropout, (Dropout{0.1F, 18446744073709551615U, 9}));
  EXPECT_EQ(p.kv_lengths, (Lengths{true, {7, 0, 3}}));
  EXPECT_EQ(p.q_lengths, (Lengths{true, {}}));
  EXPECT_EQ(p.layout, Layout::kBhsd);
  EXPECT_TRUE(p.deterministic);
}

TEST(Line, TakesSizesOfPackedSequencesFromTheirLengths) {
  const Problem p = parse_problem("fwd bf16 hq4 d64 packed_q=700+0+96 packed_kv=7+8+9");
  EXPECT_EQ(p.batch, 3);
  EXPECT_EQ(p.seqlen_q, 700);
  EXPECT_EQ(p.total_q, 796);
  EXPECT_EQ(p.seqlen_kv, 9);
  EXPECT_EQ(p.total_kv, 24);
  const Problem later = parse_problem("fwd bf16 b3 sq700 hq4 d64 packed=random:796");
  EXPECT_TRUE(later.packed());
  EXPECT_EQ(later.seqlen_kv, 700);
  EXPECT_EQ(later.total_kv, 796);
  EXPECT_TRUE(later.packed_q.values.empty());
}

TEST(Line, GivesABiasTheDtypeOfTheProblemUnlessNamed) {
  EXPECT_EQ(parse_problem("fwd bf16 b1 hq1 sq1 d8 bias=1111").bias_dtype, DType::kBFloat16);
  EXPECT_EQ(parse_problem("fwd bf16 b1 hq1 sq1 d8 bias=1111:fp32").bias_dtype, DType::kFloat32);
}

TEST(Printing, IsTheInverseOfParsing) {
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    const Problem p = random_valid_problem(seed, seed % 2 == 0 ? 9 : 100'000);
    const std::string line = to_string(p);
    ASSERT_NO_THROW(ASSERT_EQ(parse_problem(line), p) << line) << line;
    ASSERT_EQ(canonical(line), line);
  }
}

TEST(Printing, DoesNotDependOnTheLocale) {
  struct Grouping : std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
    char do_decimal_point() const override { return ','; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouping));
  const std::string line = "fwd fp32 b1 hq1 hkv1 sq123456 skv123456 d8 scale=0.25";
  EXPECT_EQ(canonical(line), line);
  EXPECT_TRUE(contains(why_not("fwd fp32 b1 hq1 sq123456 d1234"), "head_dim (1234)"));
  std::locale::global(before);
}

TEST(Refusal, SuggestsTheTokenThatWasMeant) {
  const std::string line = "fwd fp32 b1 hq1 sq4 d8 ";
  EXPECT_EQ(why_not(line + "casual=top_left"), "unknown token 'casual=top_left'; did you mean 'causal'?");
  EXPECT_TRUE(contains(why_not(line + "determinstic"), "did you mean 'deterministic'?"));
  EXPECT_TRUE(contains(why_not(line + "dropuot=0.1"), "did you mean 'dropout'?"));
  EXPECT_TRUE(contains(why_not(line + "causal=topleft"), "did you mean 'top_left'?"));
  EXPECT_TRUE(contains(why_not("fdw fp32 b1 hq1 sq4 d8"), "did you mean 'fwd'?"));
  EXPECT_EQ(why_not(line + "xyzzy"), "unknown token 'xyzzy'");
}

struct Refused {
  const char* tokens;
  const char* named;
};

TEST(Refusal, NamesTheToken) {
  const Refused padded[] = {
      {"b2", "'b2' comes after 'b1'"},
      {"causal=top_left causal=top_left", "say it once"},
      {"fwd", "'fwd' is out of place"},
      {"bf16", "'bf16' is out of place"},
      {"causal", "'causal'"},
      {"causal=", "'causal='"},
      {"causal=left", "top_left or bottom_right"},
      {"window=3", "'window=3'"},
      {"window=3,4,5", "'window=3,4,5'"},
      {"window=-1,-", "'window=-1,-'"},
      {"window=99999999999999999999,-", "out of range; give a whole number of 64 bits"},
      {"scale=1e-50", "'1e-50' is out of range; give 0, or 1e-45 to 3.4e38 in size"},
      {"softcap=1e50", "'1e50' is out of range; give 0, or 1e-45 to 3.4e38 in size"},
      {"window=9223372036854775807,-", "'window=9223372036854775807,-'"},
      {"mask=bhq", "'mask=bhq'"},
      {"mask=kqhb", "'mask=kqhb'"},
      {"bias=bhqk:fp64", "'bias=bhqk:fp64'"},
      {"bias=bhqk:", "'bias=bhqk:'"},
      {"bias=bhqk:bf16", "'bias=bhqk:bf16'"},
      {"alibi=h", "'alibi=h'"},
      {"alibi=", "'alibi='"},
      {"sink=1", "'sink=1'"},
      {"softcap=-1", "'softcap=-1'"},
      {"softcap=nan", "'softcap=nan'"},
      {"softcap=1e99", "'softcap=1e99'"},
      {"softcap=3e38", "'softcap=3e38': softcap (3e+38) must be 0 (no softcap) to 1e30"},
      {"softcap30", "'softcap=30'"},
      {"scale=inf", "'scale=inf'"},
      {"scale=0.1x", "'scale=0.1x'"},
      {"dropout=1", "'dropout=1'"},
      {"dropout=0.999999", "'dropout=0.999999'"},
      {"dropout=-0.1", "'dropout=-0.1'"},
      {"seed=-1", "'seed=-1'"},
      {"seed=18446744073709551616", "'seed=18446744073709551616'"},
      {"kvlen=1,2", "'kvlen=1,2'"},
      {"kvlen=5", "'kvlen=5': kv_lengths[0] (5) must be at most seqlen_kv (4)"},
      {"kvlen=-1", "'kvlen=-1'"},
      {"qlen=1,", "'qlen=1,'"},
      {"qlen=", "'qlen='"},
      {"packed=1+2", "'b1' contradicts 'packed=1+2'"},
      {"packed=random:9", "'packed=random:9'"},
      {"packed=random:-5", "'packed=random:-5'"},
      {"packed_q=random:4", "'packed_kv' is missing"},
      {"layout=sbhd", "'layout=sbhd'"},
      {"layout=qkv_packed skv3", "'layout=qkv_packed'"},
      {"dv513", "'dv513'"},
      {"dv0", "'dv0'"},
      {"skv-1", "'skv-1'"},
      {"skv=1", "'skv=1'"},
      {"skv", "'skv'"},
      {"hkv2", "'hq1'"},
      {"skv9223372036854775808", "'skv9223372036854775808'"},
      {"skv288230376151711744", "'skv288230376151711744'"},
      {"mask=\x01\x02", "'mask=?\?'"},
      {"größe=1", "unknown token 'größe=1'"},
      {"日本😀", "unknown token '日本😀'"},
      {"a\xc3", "'a?'"},                    // cut short
      {"a\xc0\xa0", "'a?\?'"},              // longer than it need be
      {"a\xed\xa0\x80", "'a?\?\?'"},        // half of a pair
      {"a\xf4\x90\x80\x80", "'a?\?\?\?'"},  // beyond the last
      {"a\xc2\x9b", "'a?\?'"},              // a control character
      {"a\xe2\x80\xa8", "'a?\?\?'"},        // ends a line
      {"ööööööööööööööööööööööööööööööööö", "'öööööööööööööööööööööööööööööö...'"},
  };
  for (const Refused& refused : padded) {
    EXPECT_TRUE(contains(why_not("fwd fp32 b1 hq1 sq4 d8 " + std::string(refused.tokens)), refused.named))
        << refused.tokens;
  }
  const Refused packed[] = {
      {"packed=", "'packed='"},
      {"packed=1+-2", "'packed=1+-2'"},
      {"packed=1++2", "'packed=1++2'"},
      {"packed=1,2", "'packed=1,2'"},
      {"packed=random", "'packed=random' lacks the total; it is written like 'packed=random:2096'"},
      {"packed=9223372036854775807+9223372036854775807", "'packed=9223372036854775807+9223372036854775807'"},
      {"packed=144115188075855872+144115188075855872+144115188075855872", "'packed="},
      {"packed=1+2 packed_q=1+2", "'packed_q=1+2' contradicts"},
      {"packed_q=1+2 packed_kv=1", "'packed_q=1+2'"},
      {"packed=1+2 sq2", "'sq2' contradicts"},
      {"packed=1+2 skv2", "'skv2' contradicts"},
      {"packed=1+2 kvlen=2,2", "'kvlen=2,2'"},
      {"sq4", "'b' is missing"},
      {"b4", "'sq' is missing"},
  };
  for (const Refused& refused : packed) {
    EXPECT_TRUE(contains(why_not("fwd fp32 hq1 d8 " + std::string(refused.tokens)), refused.named)) << refused.tokens;
  }
  EXPECT_TRUE(contains(why_not(""), "fwd, bwd or fwd+bwd"));
  EXPECT_TRUE(contains(why_not("fp32 fwd"), "first token"));
  EXPECT_TRUE(contains(why_not("fwd int32 b1 hq1 sq1 d1"), "'int32'"));
  EXPECT_TRUE(contains(why_not("fwd fp32 b1 sq1 d1"), "'hq' is missing"));
  EXPECT_TRUE(contains(why_not("fwd fp32 b1 hq1 sq1"), "'d' is missing"));
}

TEST(Refusal, StaysShortWhereTheTokenIsLong) {
  EXPECT_LT(why_not("fwd fp32 b1 hq1 sq1 d8 " + std::string(1 << 20, 'x')).size(), 200U);
  EXPECT_LT(why_not("fwd fp32 b1 hq1 sq1 d8 kvlen=" + std::string(1 << 20, '9')).size(), 300U);
}

/// Whatever stands on a line, it is read to a problem that prints and reads back, or refused with a sentence.
TEST(Refusal, NeverCrashesOnAMutatedLine) {
  std::mt19937_64 random(7);
  const std::string alphabet = "=,+-:._0123456789 abdefhklmnopqstvw\t\xff";
  int accepted = 0;
  for (std::uint64_t seed = 0; seed < 20000; ++seed) {
    std::string line = to_string(random_valid_problem(seed, 9));
    for (std::uint64_t edits = random() % 3 + 1; edits > 0; --edits) {
      const std::size_t at = random() % line.size();
      const char c = alphabet[random() % alphabet.size()];
      if (random() % 3 == 0) {
        line.erase(at, 1);
      } else if (random() % 2 == 0) {
        line.insert(at, 1, c);
      } else {
        line[at] = c;
      }
    }
    try {
      const Problem p = parse_problem(line);
      ++accepted;
      ASSERT_EQ(parse_problem(to_string(p)), p) << line;
    } catch (const Error& error) {
      ASSERT_EQ(error.code(), ErrorCode::kInvalidArgument) << line;
      ASSERT_GT(std::string(error.what()).size(), 10U) << line;
    }
  }
  EXPECT_GT(accepted, 500);  // otherwise the mutations were too wild to test anything
}

TEST(Options, ApplyOnTopOfAProblemAndLeaveSizesToTheTensors) {
  Problem p = parse_problem("fwd bf16 b1 hq1 sq4 d8");
  parse_options("causal=top_left dropout=0.5", p);
  EXPECT_EQ(to_string(p), "fwd bf16 b1 hq1 hkv1 sq4 skv4 d8 causal=top_left dropout=0.5");
  parse_options("", p);
  const Problem before = p;
  for (const char* size : {"b2", "hq2", "sq2", "d4", "packed=1+2"}) {
    EXPECT_TRUE(contains(refusal([&] { parse_options(std::string("sink ") + size, p); }), "not an option")) << size;
  }
  EXPECT_EQ(p, before) << "a refused line must change nothing";
}

}  // namespace
}  // namespace fovea
