#include "cuda/library.h"

#include <link.h>

#include <algorithm>
#include <filesystem>

namespace fovea::cuda {
namespace {

namespace fs = std::filesystem;

/// Every library that this process has loaded, by its path.
std::vector<fs::path> loaded_libraries() {
  std::vector<fs::path> paths;
  const auto add = [](dl_phdr_info* info, std::size_t, void* list) {
    if (info->dlpi_name != nullptr && *info->dlpi_name != 0) {
      static_cast<std::vector<fs::path>*>(list)->emplace_back(info->dlpi_name);
    }
    return 0;
  };
  ::dl_iterate_phdr(add, &paths);
  return paths;
}

/// The Python packages that a library belongs to: .../site-packages.  Empty where it belongs to none.
fs::path python_packages(fs::path path) {
  for (; path.has_relative_path(); path = path.parent_path()) {
    if (path.filename() == "site-packages" || path.filename() == "dist-packages") return path;
  }
  return {};
}

}  // namespace

std::vector<std::string> library_candidates(std::string_view stem, std::span<const char* const> names,
                                            std::span<const char* const> wheels) {
  std::vector<std::string> files;
  const auto add = [&](const std::string& file) {
    if (std::ranges::find(files, file) == files.end()) files.push_back(file);
  };
  const auto is_it = [&](const fs::path& path) { return path.filename().string().starts_with(stem); };
  const std::vector<fs::path> loaded = loaded_libraries();
  for (const fs::path& path : loaded) {
    if (is_it(path)) add(path);
  }
  for (const char* name : names) add(name);
  for (const fs::path& path : loaded) {
    const fs::path packages = python_packages(path);
    if (packages.empty()) continue;
    for (const char* wheel : wheels) {
      std::error_code ignored;
      for (const fs::directory_entry& entry : fs::directory_iterator(packages / wheel, ignored)) {
        if (is_it(entry.path())) add(entry.path());
      }
    }
  }
  return files;
}

}  // namespace fovea::cuda
