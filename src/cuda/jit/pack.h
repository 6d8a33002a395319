#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>

#include "cuda/jit/request.h"

namespace fovea::cuda::jit {

/// Many compiled kernels in one file: a line with magic, build id, count and checksum of the index; the index, a line
/// for each kernel with key, offset and length; the records (record.h).  Who compiled them does not matter.
class Pack {
 public:
  /// Throws Error(kInvalidArgument) where the file cannot be read or its index is damaged.
  [[nodiscard]] static Pack open(const std::filesystem::path& file);

  /// Throws Error(kDevice) where the file cannot be written.
  static void write(const std::filesystem::path& file, std::span<const Binary> binaries);

  /// Nothing where it is not in the pack, or its record is damaged.
  [[nodiscard]] std::optional<Binary> find(const std::string& key) const;
  [[nodiscard]] bool lists(const std::string& key) const { return index_.contains(key); }

  [[nodiscard]] const std::filesystem::path& file() const { return file_; }
  [[nodiscard]] const std::string& build() const { return build_; }  ///< the build id it was made with
  [[nodiscard]] std::size_t size() const { return index_.size(); }   ///< kernels

 private:
  struct Place {
    std::uint64_t offset, bytes;
  };

  std::filesystem::path file_;
  std::string build_;
  std::map<std::string, Place> index_;
};

}  // namespace fovea::cuda::jit
