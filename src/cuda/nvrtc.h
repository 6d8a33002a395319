#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

// NVRTC, NVIDIA's run-time compiler, opened at run time.  Compiling needs no GPU and no driver.
namespace fovea::cuda {

/// A header that sources can include by its name; both strings are zero-terminated.
struct Header {
  const char* name;
  const char* text;
};

class Nvrtc {
 public:
  /// The compiler of this process: the file that FOVEA_NVRTC names, else the first of version 12.4 or later among a
  /// library already loaded, the system's, the toolkit's and those of Python wheels, preferring one no newer than the
  /// driver.  Null where there is none.
  [[nodiscard]] static const Nvrtc* find();
  [[nodiscard]] static const std::string& named();     ///< FOVEA_NVRTC, as it is when first asked for
  [[nodiscard]] static const std::string& why_none();  ///< one sentence; empty where there is one

  [[nodiscard]] const std::string& path() const { return path_; }
  [[nodiscard]] const std::string& version() const { return version_; }  ///< "13.0"
  [[nodiscard]] bool knows(int arch) const;                              ///< 90 for sm_90

  struct Result {
    bool done = false;
    std::string cubin;  ///< empty unless done
    std::string log;    ///< of the compiler and the assembler
  };
  /// From any number of threads at once.  Throws Error where NVRTC itself fails, not where the source does.
  [[nodiscard]] Result compile(const std::string& source, const char* file_name, std::span<const Header> headers,
                               std::span<const char* const> options) const;

 private:
  struct Functions;
  struct Found;
  static const Found& found();
  std::string open(const std::string& file);  // why not; empty: it is
  void check(int status, const char* what) const;

  std::shared_ptr<const Functions> call_;
  int number_ = 0;  // 13000 for 13.0, as the driver counts
  std::string path_, version_;
  std::vector<int> archs_;
};

}  // namespace fovea::cuda
