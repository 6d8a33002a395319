#include "tools/picture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "cpu/elements.h"
#include "cpu/reference.h"
#include "files/tensor_data.h"
#include "support.h"
#include "tools/workload.h"

namespace fovea::tools {
namespace {

std::string temporary(const std::string& name) {
  return (std::filesystem::temp_directory_path() / ("fovea_picture_test_" + name)).string();
}

std::string read_file(const std::string& path) {
  std::ifstream stream(path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::int64_t starts_at(const Tensor& cu_seqlens, std::int64_t sequence) {
  return static_cast<const std::int32_t*>(cu_seqlens.data)[sequence];
}

/// The weights of a whole call as the oracle gives them: out for a v whose key j has a one in column j.
/// [batch, seqlen_q, num_q_heads, seqlen_kv], or [total_q, num_q_heads, seqlen_kv].
std::vector<double> exact_weights(Problem problem, Inputs inputs) {
  problem.direction = Direction::kForward;
  problem.dropout = {};
  problem.head_dim_v = problem.seqlen_kv;
  const std::int64_t keys = problem.packed() ? problem.total_kv : problem.batch * problem.seqlen_kv;
  const files::OwnedTensor v(problem.dtype, std::array{keys, problem.num_kv_heads, problem.seqlen_kv});
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const std::int64_t first = problem.packed() ? starts_at(inputs.cu_seqlens_kv, b) : b * problem.seqlen_kv;
    const std::int64_t last = problem.packed() ? starts_at(inputs.cu_seqlens_kv, b + 1) : first + problem.seqlen_kv;
    for (std::int64_t row = first; row < last; ++row) {
      for (std::int64_t g = 0; g < problem.num_kv_heads; ++g) {
        cpu::store(v.view(), (row * problem.num_kv_heads + g) * problem.seqlen_kv + row - first, 1.0);
      }
    }
  }
  inputs.v = problem.packed()
                 ? v.view()
                 : Tensor::contiguous(v.view().data, problem.dtype,
                                      {problem.batch, problem.seqlen_kv, problem.num_kv_heads, problem.seqlen_kv});
  return cpu::reference(problem, inputs).out;
}

/// Whether the picture of every sequence shows the oracle's weights.
void expect_exact(const Problem& problem, const Inputs& inputs) {
  const std::vector<double> exact = exact_weights(problem, inputs);
  for (std::int64_t b = 0; b < problem.batch; ++b) {
    const AttentionPicture picture = make_attention_picture(problem, inputs, b);
    ASSERT_EQ(picture.heads.size(), static_cast<std::size_t>(problem.num_q_heads));
    const std::int64_t first = problem.packed() ? starts_at(inputs.cu_seqlens_q, b) : b * problem.seqlen_q;
    std::size_t at = 0;
    for (std::int64_t h = 0; h < problem.num_q_heads; ++h) {
      for (std::int64_t i = 0; i < picture.seqlen_q; ++i) {
        for (std::int64_t j = 0; j < picture.seqlen_kv; ++j) {
          const double wanted = exact[((first + i) * problem.num_q_heads + h) * problem.seqlen_kv + j];
          const double found = picture.weights.at(at++);
          ASSERT_TRUE(std::abs(found - wanted) < 5e-4 || (std::isnan(found) && std::isnan(wanted)))
              << "sequence " << b << " head " << h << " row " << i << " key " << j << ": " << found << ", not "
              << wanted;
        }
      }
    }
    EXPECT_EQ(at, picture.weights.size());
  }
}

TEST(Picture, ShowsTheExactWeightsWhateverTheOptions) {
  int drawn = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    Problem problem = test::random_valid_problem(seed, 9);
    problem.num_q_heads = problem.num_q_heads / problem.num_kv_heads * 2;
    problem.num_kv_heads = 2;
    problem.head_dim = 1 + problem.head_dim % 70;
    if (problem.seqlen_kv == 0) continue;
    const Workload work(problem, seed, Data::kHostile);
    SCOPED_TRACE(to_string(work.problem()) + ", seed " + std::to_string(seed));
    Problem asked = work.problem();
    if (seed % 3 == 0) {  // lengths known only at run time
      asked.q_lengths.values.clear();
      asked.kv_lengths.values.clear();
    }
    expect_exact(asked, work.inputs());
    if (HasFatalFailure()) return;
    ++drawn;
  }
  EXPECT_GT(drawn, 200);
}

TEST(Picture, AveragesLongSequencesInBlocks) {
  const Workload work(parse_problem("fwd fp32 b1 hq2 hkv1 sq700 skv1300 d8 causal=bottom_right"), 1);
  const AttentionPicture picture = make_attention_picture(work.problem(), work.inputs(), 0, {1});
  ASSERT_EQ(picture.block_q, 2);
  ASSERT_EQ(picture.block_kv, 3);
  constexpr std::int64_t kColumns = 434;
  ASSERT_EQ(picture.weights.size(), 350U * kColumns);

  const std::vector<double> q = cpu::load_all(work.inputs().q), k = cpu::load_all(work.inputs().k);
  std::vector<double> wanted(picture.weights.size());
  for (std::int64_t i = 0; i < 700; ++i) {
    std::vector<double> p(static_cast<std::size_t>(i + 601));  // the keys up to the bottom-right diagonal
    double sum = 0.0;
    for (std::size_t j = 0; j < p.size(); ++j) {
      double score = 0.0;
      for (std::size_t d = 0; d < 8; ++d) score += q[(i * 2 + 1) * 8 + d] * k[j * 8 + d];
      sum += p[j] = std::exp(score / std::sqrt(8.0));
    }
    for (std::size_t j = 0; j < p.size(); ++j) wanted[i / 2 * kColumns + j / 3] += p[j] / sum / 2;
  }
  for (std::size_t at = 0; at < wanted.size(); ++at) ASSERT_NEAR(picture.weights[at], wanted[at], 1e-5) << at;
}

TEST(Picture, RefusesWhatItCanNotDraw) {
  const Workload work(parse_problem("fwd fp32 b2 hq3 sq4 d8"), 1);
  const auto draw = [&](std::int64_t sequence, std::vector<std::int64_t> heads) {
    return test::refusal([&] { (void)make_attention_picture(work.problem(), work.inputs(), sequence, heads); });
  };
  EXPECT_TRUE(test::contains(draw(2, {}), "(2) must be one of the batch: 0 to 1"));
  EXPECT_TRUE(test::contains(draw(-1, {}), "(-1)"));
  EXPECT_TRUE(test::contains(draw(0, {0, 3}), "(3) must be a query head: 0 to 2"));

  AttentionPicture picture = make_attention_picture(work.problem(), work.inputs());
  picture.tokens_kv = {"one", "two"};
  const std::string path = temporary("refused.html");
  EXPECT_TRUE(test::contains(test::refusal([&] { write_attention_picture(path, picture); }),
                             "tokens_kv holds 2 entries, but the picture needs 4"));
  EXPECT_FALSE(std::filesystem::exists(path));
  picture.tokens_kv.clear();
  test::refusal([&] { write_attention_picture("/nowhere/at/all.html", picture); });
}

TEST(Picture, KeepsHostileTextInsideItsData) {
  const Workload work(parse_problem("fwd fp32 b1 hq1 sq2 d8"), 1);
  AttentionPicture picture = make_attention_picture(work.problem(), work.inputs());
  const std::string hostile = "</script><!-- \xff @DATA@ @STYLE@";
  picture.title = hostile;
  picture.facts = {{hostile, hostile}};
  picture.tokens_q = picture.tokens_kv = {hostile, ""};
  const std::string path = temporary("hostile.html");
  write_attention_picture(path, picture);
  const std::string page = read_file(path);
  std::filesystem::remove(path);
  const std::size_t begin = page.find("id=\"data\">"), end = page.find("</script>", begin);
  ASSERT_NE(end, std::string::npos);
  const std::string data = page.substr(begin, end - begin);
  EXPECT_EQ(data.find('<'), std::string::npos);
  EXPECT_TRUE(test::contains(data, "@DATA@ @STYLE@"));
  EXPECT_TRUE(test::contains(data, "}"));
}

}  // namespace
}  // namespace fovea::tools
