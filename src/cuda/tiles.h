#pragma once

#include <fovea/problem.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// Which tile of a table a problem takes: what `fovea tune` found fastest on this GPU, else the first that suits.
namespace fovea::cuda {

inline constexpr const char *kHopperName = "cuda_hopper", *kPortableName = "cuda_portable";  // of backends
inline constexpr int kSm90 = 90;  // compute capability, and architecture, of the Hopper family
inline constexpr int kAny = std::numeric_limits<int>::max();  // in a table's row: as many as there may be
inline constexpr const char* kMeasured = ", by fovea tune";   // behind a tile's name

/// The measured tile of each kind of problem on one model of GPU, by its name; lines of a file beside the kernel cache.
/// Safe to use from any number of threads.
class TileChoices {
 public:
  explicit TileChoices(std::filesystem::path file);  ///< an empty path or an unreadable file: no choices

  [[nodiscard]] bool empty() const;
  [[nodiscard]] std::string find(const std::string& kind) const;  ///< empty: not measured
  void set(const std::string& kind, const std::string& tile);     ///< until the process ends; empty: forget it
  [[nodiscard]] std::map<std::string, std::string> all() const;
  [[nodiscard]] const std::filesystem::path& file() const { return file_; }

  /// Writes what was set, and keeps what other processes wrote meanwhile.  False where the file cannot be written.
  [[nodiscard]] bool save();

 private:
  std::filesystem::path file_;
  mutable std::mutex mutex_;
  std::map<std::string, std::string> kept_, set_;  // of the file; since then
};

/// "64 rows × 128 keys, 2 stages": how the name of every tile begins.
[[nodiscard]] std::string tile_text(int rows, int keys, int stages);

/// Problems of one kind take one tile.  The kind is the backend's name and a problem line with sizes rounded to the
/// nearest power of two and without the numbers that no loop depends on.
[[nodiscard]] std::string kind_of(std::string_view backend, Problem problem);

/// One reading of a backend's table.
class TileReader {
 public:
  /// `choices` may be null.  `names`, unless null, receives every tile that fits, in the table's order.
  TileReader(const TileChoices* choices, std::vector<std::string>* names, std::string_view backend,
             const Problem& problem);

  /// `fits`: the kernel can run with this tile; `suits`: the table recommends it; `name`: of the tile that `fits` saw
  /// last.  The measured tile if it fits, else the first that fits and suits, else null.
  template <class Tile, class Fits, class Suits, class Name>
  const Tile* read(std::span<const Tile> table, const Fits& fits, const Suits& suits, const Name& name) {
    const Tile *first = nullptr, *chosen = nullptr;
    for (const Tile& tile : table) {
      if (!fits(tile)) continue;
      if (first == nullptr && suits(tile)) first = &tile;
      if (wanted_.empty() && names_ == nullptr) {
        if (first != nullptr) break;
        continue;
      }
      const std::string called = name();
      if (chosen == nullptr && called == wanted_) chosen = &tile;
      if (names_ != nullptr && std::ranges::find(*names_, called) == names_->end()) names_->push_back(called);
    }
    measured_ = chosen != nullptr;
    return measured_ ? chosen : first;
  }

  [[nodiscard]] bool measured() const { return measured_; }  ///< the last answer is `fovea tune`'s

 private:
  std::vector<std::string>* names_;
  std::string wanted_;
  bool measured_ = false;
};

}  // namespace fovea::cuda
