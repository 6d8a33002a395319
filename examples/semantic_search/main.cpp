// Semantic search without any framework: embeds the lines of a text, then finds those that mean what a query means.
//
//   semantic_search [--device cuda] MODEL TEXT [--check REFERENCE.safetensors] [QUERY...]
//
// MODEL is the folder of all-MiniLM-L6-v2 (vocab.txt, model.safetensors).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <numeric>
#include <stdexcept>

#include "mini_lm.h"

namespace {

constexpr std::size_t kShown = 3;
constexpr double kTolerance = 1e-4;

std::vector<std::string> lines_of(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) {
    if (line.find_first_not_of(" \t\r") != std::string::npos) lines.push_back(line);
  }
  if (lines.empty()) throw std::runtime_error(path + ": has no lines; give a text with a sentence a line");
  return lines;
}

/// A recorded embedding of every line, read like any other parameters.
struct Reference : fovea::nn::Module {
  explicit Reference(std::int64_t count)
      : embeddings(fovea::DType::kFloat32, {count, MiniLm::kFeatures}, fovea::Device{}) {}
  void visit(const std::string& prefix, const Visit& visit) override { visit(prefix + "embeddings", embeddings); }
  fovea::nn::Parameter embeddings;
};

/// The largest difference from the reference.
double compare(const std::vector<float>& rows, const std::string& path) {
  Reference reference(std::ssize(rows) / MiniLm::kFeatures);
  fovea::nn::load(reference, path);
  const auto* expected = static_cast<const float*>(reference.embeddings.value.view().data);
  double largest = 0.0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const double apart = std::abs(static_cast<double>(rows[i]) - static_cast<double>(expected[i]));
    largest = std::max(largest, std::isnan(apart) ? HUGE_VAL : apart);  // std::max would pass over NaN
  }
  return largest;
}

void answer(const MiniLm& model, const std::vector<std::string>& lines, const std::vector<float>& rows,
            const std::string& query) {
  const std::vector<float> wanted = model.embed(std::span(&query, 1));
  std::vector<std::pair<float, std::size_t>> scores;
  for (std::size_t line = 0; line < lines.size(); ++line) {
    const auto row = rows.begin() + static_cast<std::ptrdiff_t>(line) * MiniLm::kFeatures;
    scores.emplace_back(std::inner_product(wanted.begin(), wanted.end(), row, 0.0F), line);
  }
  const std::size_t shown = std::min(kShown, scores.size());
  std::partial_sort(scores.begin(), scores.begin() + static_cast<std::ptrdiff_t>(shown), scores.end(),
                    std::greater<>());
  std::printf("\n  %s\n", query.c_str());
  for (std::size_t i = 0; i < shown; ++i) {
    std::printf("    %.3f  %s\n", static_cast<double>(scores[i].first), lines[scores[i].second].c_str());
  }
}

int run(std::vector<std::string> words) {
  fovea::Device device;
  if (words.size() > 1 && words[0] == "--device") {
    if (words[1] != "cpu" && words[1] != "cuda")
      throw std::runtime_error("--device '" + words[1] + "' is unknown; use cpu or cuda");
    if (words[1] == "cuda") device.kind = fovea::DeviceKind::kCuda;
    words.erase(words.begin(), words.begin() + 2);
  }
  if (words.size() < 2) {
    std::fputs("usage: semantic_search [--device cuda] MODEL TEXT [--check REFERENCE.safetensors] [QUERY...]\n",
               stderr);
    return 2;
  }
  if (words.back() == "--check") throw std::runtime_error("--check needs a file of embeddings");
  const MiniLm model(words[0], device);
  const std::vector<std::string> lines = lines_of(words[1]);
  const auto seconds = [start = std::chrono::steady_clock::now()] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  const std::vector<float> rows = model.embed(lines);
  const double took = seconds();
  const auto tokens = static_cast<double>(model.count_tokens(lines));
  std::printf("  %zu lines, %.0f tokens, embedded in %.2f s: %.0f tokens/s\n", lines.size(), tokens, took,
              tokens / took);

  std::size_t next = 2;
  int status = 0;
  if (next + 1 < words.size() && words[next] == "--check") {
    const double difference = compare(rows, words[next + 1]);
    status = difference <= kTolerance ? 0 : 1;
    std::printf("  %s: at most %.1e from the reference embeddings; %.0e are allowed\n", status == 0 ? "right" : "WRONG",
                difference, kTolerance);
    next += 2;
  }
  std::vector<std::string> queries(words.begin() + static_cast<std::ptrdiff_t>(next), words.end());
  if (queries.empty()) queries = {"how do I make bread?", "animals that talk to each other", "the computer went down"};
  for (const std::string& query : queries) answer(model, lines, rows, query);
  return status;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run({words + 1, words + count});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "semantic_search: %s\n", error.what());
    return 2;
  }
}
