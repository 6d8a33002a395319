// What `fovea tune` may choose and what becomes of it: kinds of problems, the file, and the tables that are read by it.
#include "cuda/tiles.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "cuda/backward_tuning.h"
#include "cuda/forward_tuning.h"
#include "cuda/hopper_backward.h"
#include "cuda/hopper_tuning.h"
#include "cuda/jit/cache.h"
#include "cuda/requests.h"

namespace fovea::cuda {
namespace {

namespace fs = std::filesystem;

std::string kind(const std::string& line) { return kind_of("cuda_hopper", parse_problem(line)); }

TEST(Kinds, CountSizesByPowersOfTwoAndForgetWhatNoLoopSees) {
  const std::string base = "fwd bf16 b4 hq16 sq4096 d128";
  EXPECT_EQ(kind(base), "cuda_hopper fwd bf16 b4 hq16 hkv16 sq4096 skv4096 d128");
  EXPECT_EQ(kind("fwd bf16 b4 hq16 sq2897 d128"), kind(base)) << "nearer by its ratio";
  EXPECT_EQ(kind("fwd bf16 b4 hq16 sq5792 d128"), kind(base));
  EXPECT_NE(kind("fwd bf16 b4 hq16 sq2896 d128"), kind(base));
  EXPECT_EQ(kind(base + " scale=0.3 layout=bhsd"), kind(base));
  EXPECT_EQ(kind(base + " dropout=0.1 seed=7 offset=3"), kind(base + " dropout=0.3"));
  EXPECT_EQ(kind(base + " softcap=30"), kind(base + " softcap=50"));
  EXPECT_EQ(kind(base + " kvlen=9,8,7,4096"), kind(base + " kvlen=random"));
  EXPECT_EQ(kind("fwd bf16 hq2 d64 packed=700+1300"), kind("fwd bf16 hq2 d64 packed=1100+1000"));
  EXPECT_EQ(kind(base + " window=250,-"), kind(base + " window=256,-"));
  for (const char* option :
       {" causal=top_left", " causal=bottom_right", " window=256,-", " mask=11qk", " mask=b11k", " bias=1hqk",
        " bias=1hqk:bf16", " alibi", " sink", " softcap=30", " dropout=0.1", " kvlen=random", " deterministic"}) {
    EXPECT_NE(kind(base + option), kind(base)) << option;
  }
  EXPECT_NE(kind_of("cuda_portable", parse_problem(base)), kind(base));
  EXPECT_NE(kind("bwd bf16 b4 hq16 sq4096 d128"), kind(base));
}

class Choices : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = fs::temp_directory_path() / "fovea-tiles-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name, file_ = folder_ / "build" / "tiles.txt";
  }
  void TearDown() override { fs::remove_all(folder_); }

  fs::path folder_, file_;
};

TEST_F(Choices, OutliveTheProcess) {
  TileChoices first(file_);
  EXPECT_TRUE(first.empty());
  first.set("a kind", "a tile, 2 stages");
  first.set("another", "a second");
  EXPECT_EQ(first.find("a kind"), "a tile, 2 stages");
  EXPECT_TRUE(TileChoices(file_).empty()) << "until they are saved";
  ASSERT_TRUE(first.save());
  TileChoices second(file_);
  EXPECT_EQ(second.all(), first.all());
  second.set("a kind", "");
  EXPECT_EQ(second.find("a kind"), "");
  ASSERT_TRUE(second.save());
  EXPECT_EQ(TileChoices(file_).all().size(), 1U);
}

TEST_F(Choices, OfTwoProcessesAreBothKept) {
  TileChoices one(file_), other(file_);
  one.set("one's", "a");
  other.set("other's", "b");
  ASSERT_TRUE(one.save());
  ASSERT_TRUE(other.save());
  EXPECT_EQ(TileChoices(file_).all().size(), 2U);
}

TEST_F(Choices, OfTwoThatSaveAtOnceAreAllKept) {
  constexpr int kSaves = 100;
  const auto save_many = [&](const std::string& whose) {
    TileChoices choices(file_);
    for (int i = 0; i < kSaves; ++i) {
      choices.set(whose + std::to_string(i), "tile");
      EXPECT_TRUE(choices.save());
    }
  };
  std::thread other(save_many, "other's ");
  save_many("one's ");
  other.join();
  EXPECT_EQ(TileChoices(file_).all().size(), 2U * kSaves);
}

TEST_F(Choices, ThatCouldNotBeWrittenAreAtTheNextSave) {
  TileChoices choices(file_);
  choices.set("a kind", "a tile");
  std::ofstream(file_.parent_path()) << "where the folder should be";
  EXPECT_FALSE(choices.save());
  EXPECT_EQ(choices.find("a kind"), "a tile");
  fs::remove(file_.parent_path());
  EXPECT_TRUE(choices.save());
  EXPECT_EQ(TileChoices(file_).find("a kind"), "a tile");
}

TEST_F(Choices, AFileThatIsNoneIsNone) {
  fs::create_directories(file_.parent_path());
  std::ofstream(file_, std::ios::binary) << "no tab here\n\n\t\n"
                                         << std::string(3, '\0') << "kind\ttile\nkind 2\tcut off";
  TileChoices choices(file_);
  EXPECT_EQ(choices.find("kind 2"), "cut off");
  EXPECT_EQ(choices.find(""), "");
  fs::create_directories(folder_ / "a folder");
  EXPECT_TRUE(TileChoices(folder_ / "a folder").empty());
  TileChoices nowhere{{}};
  nowhere.set("kind", "tile");
  EXPECT_EQ(nowhere.find("kind"), "tile");
  EXPECT_FALSE(nowhere.save());
}

TEST_F(Choices, LieBesideTheKernelsUnlessThoseAreNotRead) {
  using jit::Cache;
  Cache cache({.mode = jit::Mode::kOn, .folder = folder_, .packs = {}, .compiler = {}});
  EXPECT_EQ(cache.tiles("NVIDIA H100 80GB HBM3").file().filename(), "tiles-NVIDIA-H100-80GB-HBM3.txt");
  EXPECT_EQ(&cache.tiles("a/../b"), &cache.tiles("a/../b"));
  EXPECT_EQ(cache.tiles("a/../b").file().parent_path(), cache.tiles("c").file().parent_path());
  Cache off({.mode = jit::Mode::kOff, .folder = folder_, .packs = {}, .compiler = {}});
  EXPECT_TRUE(off.tiles("c").file().empty());
}

// ---- the tables

struct Question {
  const char* line;
  const char* backend;
  int sm;
};
constexpr Question kQuestions[] = {
    {"fwd bf16 b4 hq16 sq4096 d128", "cuda_hopper", 90},
    {"fwd bf16 b4 hq16 sq4096 d128 mask=11qk dropout=0.1", "cuda_hopper", 90},
    {"fwd bf16 b32 hq16 sq512 d256 bias=1hqk causal=top_left", "cuda_hopper", 90},
    {"bwd bf16 b33 hq16 sq512 d64 deterministic", "cuda_hopper", 90},
    {"bwd bf16 b4 hq16 sq4096 d192 mask=11qk", "cuda_hopper", 90},
    {"fwd bf16 b4 hq16 sq4096 d64", "cuda_portable", 80},
    {"fwd fp32 b4 hq16 sq4096 d96 softcap=20", "cuda_portable", 86},
    {"fwd bf16 b1 hq32 hkv8 sq1 skv8192 d128", "cuda_portable", 90},
    {"fwd fp16 b1 hq4 sq300 d64", "cuda_portable", 75},
    {"fwd bf16 b1 hq4 sq300 d64", "cuda_portable", 75},
    {"bwd bf16 b4 hq16 sq4096 d128 deterministic", "cuda_portable", 80},
    {"bwd fp32 b4 hq16 sq4096 d64 alibi", "cuda_portable", 120},
};

GpuModel with(const Question& question, const TileChoices* choices) {
  GpuModel model = model_of(question.sm);
  model.choices = choices;
  return model;
}

/// The tile's name, whether it was measured.
std::pair<std::string, bool> tile_of(const Question& question, const TileChoices* choices) {
  const Problem problem = parse_problem(question.line);
  const GpuModel model = with(question, choices);
  const auto said = [](const auto& shape) {
    EXPECT_TRUE(shape.has_value());
    return std::pair(name_of(*shape), shape->measured);
  };
  const bool forward = problem.direction == Direction::kForward;
  if (question.backend == std::string(kHopperName))
    return forward ? said(choose_forward_sm90(problem, model)) : said(choose_backward_sm90(problem, model));
  return forward ? said(choose_forward(problem, model)) : said(choose_backward(problem, model));
}

TEST(Tables, GiveWhatWasMeasuredAndElseTheirOwn) {
  for (const Question& question : kQuestions) {
    const Problem problem = parse_problem(question.line);
    const auto offered = tiles_on_offer(problem, question.backend, model_of(question.sm));
    const auto own = tile_of(question, nullptr);
    EXPECT_FALSE(own.second);
    EXPECT_NE(std::ranges::find(offered, own.first, &OfferedTile::name), offered.end()) << question.line;
    std::vector<std::string> kernels;
    for (const OfferedTile& tile : offered) {
      TileChoices choices{{}};
      choices.set(kind_of(question.backend, problem), tile.name);
      EXPECT_EQ(tile_of(question, &choices), std::pair(tile.name, true)) << question.line;
      kernels.push_back(tile.kernels.front().unit);
    }
    std::ranges::sort(kernels);
    EXPECT_EQ(std::ranges::adjacent_find(kernels), kernels.end()) << "two names of one kernel: " << question.line;
    TileChoices unknown{{}};
    unknown.set(kind_of(question.backend, problem), "7 rows × 3 keys");
    EXPECT_EQ(tile_of(question, &unknown), own) << "a tile of another build: " << question.line;
    TileChoices others{{}};
    others.set(kind_of(question.backend, problem) + " sink", offered.back().name);
    EXPECT_EQ(tile_of(question, &others), own) << "another kind: " << question.line;
  }
}

}  // namespace
}  // namespace fovea::cuda
