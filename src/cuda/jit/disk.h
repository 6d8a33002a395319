#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "cuda/jit/request.h"

namespace fovea::cuda::jit {

/// While it lives, no other process has a lock of this number on the file; so says everybody who could open it, and
/// nobody waits for long.
class FileLock {
 public:
  explicit FileLock(const std::filesystem::path& file, std::int64_t number = 0);
  ~FileLock();
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

 private:
  int descriptor_;
};

/// Compiled kernels that outlive the process: FOLDER/BUILD_ID/sm_80/NAME-KEY-COMPILER.cubin, and beside it as .json
/// what is known of it.  Best effort: what cannot be read or written is as if it were not there.
class Disk {
 public:
  explicit Disk(std::filesystem::path folder) : folder_(std::move(folder)) {}  ///< empty: no disk

  [[nodiscard]] const std::filesystem::path& folder() const { return folder_; }

  /// `compiler` empty: whoever compiled it.  Where there are several, the first that serves.
  [[nodiscard]] std::optional<Binary> find(const KernelRequest& request, const std::string& key,
                                           const std::string& compiler,
                                           const std::function<bool(const Binary&)>& serves = {}) const;
  void store(const Binary& binary) const;

  /// While it lives, no other process compiles this kernel.
  [[nodiscard]] FileLock lock(int arch, const std::string& key) const;

  /// The file of cuda::TileChoices, FOLDER/BUILD_ID/tiles-GPU.txt.
  [[nodiscard]] std::filesystem::path tiles_of(const std::string& gpu) const;

  struct Usage {
    std::int64_t kernels = 0, bytes = 0;  ///< of all builds
    bool writable = false;
  };
  [[nodiscard]] Usage usage() const;

 private:
  [[nodiscard]] std::filesystem::path folder_of(int arch) const;

  std::filesystem::path folder_;
};

}  // namespace fovea::cuda::jit
