#include "cuda/tiles.h"

#include <bit>
#include <sstream>
#include <utility>

#include "cuda/jit/disk.h"
#include "cuda/jit/record.h"
#include "cuda/row_copies.h"

namespace fovea::cuda {
namespace {

constexpr char kBetween = '\t';  // a kind and its tile; neither contains one

std::map<std::string, std::string> read_choices(const std::filesystem::path& file) {
  std::map<std::string, std::string> choices;
  std::istringstream lines(file.empty() ? "" : jit::read_file(file).value_or(""));
  for (std::string line; std::getline(lines, line);) {
    const std::size_t at = line.find(kBetween);
    if (at != std::string::npos) choices[line.substr(0, at)] = line.substr(at + 1);
  }
  return choices;
}

/// The nearest power of two by ratio.
std::int64_t nearest_power(std::int64_t size) {
  if (size <= 1) return size;
  const std::uint64_t below = std::bit_floor(static_cast<std::uint64_t>(size));
  const double ratio = static_cast<double>(size) / static_cast<double>(below);
  return static_cast<std::int64_t>(ratio * ratio < 2 ? below : 2 * below);
}

}  // namespace

TileChoices::TileChoices(std::filesystem::path file) : file_(std::move(file)), kept_(read_choices(file_)) {}

bool TileChoices::empty() const {
  const std::lock_guard lock(mutex_);
  return kept_.empty() && set_.empty();
}

std::string TileChoices::find(const std::string& kind) const {
  const std::lock_guard lock(mutex_);
  if (const auto at = set_.find(kind); at != set_.end()) return at->second;
  const auto at = kept_.find(kind);
  return at == kept_.end() ? "" : at->second;
}

void TileChoices::set(const std::string& kind, const std::string& tile) {
  const std::lock_guard lock(mutex_);
  set_[kind] = tile;
}

std::map<std::string, std::string> TileChoices::all() const {
  const std::lock_guard lock(mutex_);
  std::map<std::string, std::string> choices = kept_;
  for (const auto& [kind, tile] : set_) choices[kind] = tile;
  std::erase_if(choices, [](const auto& choice) { return choice.second.empty(); });
  return choices;
}

bool TileChoices::save() {
  if (file_.empty()) return false;
  const std::lock_guard lock(mutex_);
  const jit::FileLock among_processes(file_.string() + ".lock");  // so that nothing written meanwhile is lost
  kept_ = read_choices(file_);
  for (auto& [kind, tile] : set_) kept_[kind] = tile;
  std::erase_if(kept_, [](const auto& choice) { return choice.second.empty(); });
  std::string text;
  for (const auto& [kind, tile] : kept_) text += kind + kBetween + tile + '\n';
  if (!jit::write_file(file_, text)) return false;
  set_.clear();
  return true;
}

std::string tile_text(int rows, int keys, int stages) {
  return std::to_string(rows) + " rows × " + std::to_string(keys) + " keys, " + std::to_string(stages) +
         (stages == 1 ? " stage" : " stages");
}

std::string kind_of(std::string_view backend, Problem problem) {
  problem = padded(problem);
  for (std::int64_t* size : {&problem.seqlen_q, &problem.seqlen_kv, &problem.total_q, &problem.total_kv})
    *size = nearest_power(*size);
  for (auto* window : {&problem.window_left, &problem.window_right})
    if (*window) *window = nearest_power(**window);
  for (Lengths* lengths : {&problem.q_lengths, &problem.kv_lengths, &problem.packed_q, &problem.packed_kv})
    lengths->values.clear();
  problem.softmax_scale.reset();
  problem.softcap = problem.softcap == 0.0F ? 0.0F : 1.0F;
  if (problem.dropout.probability > 0.0F) problem.dropout = {.probability = 0.5F, .seed = 0, .offset = 0};
  problem.layout = Layout::kBshd;
  return std::string(backend) + " " + to_string(problem);
}

TileReader::TileReader(const TileChoices* choices, std::vector<std::string>* names, std::string_view backend,
                       const Problem& problem)
    : names_(names) {
  if (choices != nullptr && !choices->empty()) wanted_ = choices->find(kind_of(backend, problem));
}

}  // namespace fovea::cuda
