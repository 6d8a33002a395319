#include "cuda/jit/compile.h"

#include <fovea/error.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <unordered_map>
#include <vector>

#include "cuda/driver.h"
#include "cuda/jit/device_text.h"
#include "cuda/jit/record.h"
#include "cuda/jit/sha256.h"

namespace fovea::cuda::jit {
namespace {

namespace fs = std::filesystem;

constexpr std::array kOptions{"-std=c++20", "--ptxas-options=-v"};

/// The number in front of `words`: "... 24 bytes spill stores".  0 where they are not there.
int number_before(const std::string& line, const std::string& words) {
  const std::size_t end = line.find(words);
  if (end == std::string::npos) return 0;
  std::size_t begin = end;
  while (begin > 0 && std::isdigit(static_cast<unsigned char>(line[begin - 1])) != 0) --begin;
  return std::atoi(line.c_str() + begin);
}

std::string first_error(const std::string& log) {
  std::istringstream lines(log);
  std::string first;
  for (std::string line; std::getline(lines, line);) {
    if (line.find("error") != std::string::npos || line.find("fatal") != std::string::npos) return line;
    if (first.empty()) first = line;
  }
  return first.empty() ? "the compiler says nothing" : first;
}

/// The sentence is of use even where writing failed.
std::string save_source(const KernelRequest& request, const std::string& log) {
  std::error_code ignored;
  std::string file = fs::temp_directory_path(ignored) / ("fovea-" + request.name + "-XXXXXX.cu");
  const int descriptor = ::mkstemps(file.data(), 3);
  if (descriptor < 0) return "its source could not be saved to " + file;
  ::close(descriptor);
  std::ofstream(file) << request.unit << "\n/* " << log << "\n*/\n";
  return "its source and the whole log are in " + file;
}

std::string name_of(const Nvrtc& nvrtc) { return "NVRTC " + nvrtc.version(); }

/// What is remembered of a library, and all that must still be so for it to be the one that would be found.
std::string note_of(const std::string& name, const std::string& library) {
  std::error_code no_size, no_time;
  const std::uintmax_t size = fs::file_size(library, no_size);
  const auto time = fs::last_write_time(library, no_time).time_since_epoch().count();
  return no_size || no_time ? ""
                            : name + "\n" + library + "\n" + std::to_string(size) + " " + std::to_string(time) +
                                  "\ndriver " + std::to_string(driver_version()) + "\n" + Nvrtc::named() + "\n";
}

/// Of this thread's processor: what else the machine does makes no kernel slower to compile.
double seconds_of_thread() {
  timespec now{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

Binary compile(const KernelRequest& request) {
  const Nvrtc* nvrtc = Nvrtc::find();
  if (nvrtc == nullptr)
    throw Error(ErrorCode::kDevice, "kernel " + request.name + " cannot be compiled: " + Nvrtc::why_none());
  const std::string sm = target_of(request), compiler = name_of(*nvrtc);
  if (!nvrtc->knows(request.arch)) {
    throw Error(ErrorCode::kUnsupported,
                compiler + " (" + nvrtc->path() + ") does not compile for " + sm + "; name another one in FOVEA_NVRTC");
  }
  const std::string arch_option = "-arch=" + sm;
  std::vector<const char*> options{arch_option.c_str()};
  options.insert(options.end(), kOptions.begin(), kOptions.end());

  const double start = seconds_of_thread();
  const std::string file_name = request.name + ".cu";
  Nvrtc::Result result = nvrtc->compile(request.unit, file_name.c_str(), device_text, options);
  if (!result.done) {
    throw Error(ErrorCode::kInternal, "kernel " + request.name + " did not compile for " + sm + " with " + compiler +
                                          ": " + first_error(result.log) + "; " + save_source(request, result.log));
  }
  Binary binary;
  binary.key = content_key(request);
  binary.name = request.name;
  binary.arch = request.arch;
  binary.compiler = compiler;
  binary.seconds = seconds_of_thread() - start;
  binary.cubin = std::move(result.cubin);
  read_log(result.log, binary);
  return binary;
}

}  // namespace

const char* name(Source source) {
  constexpr std::array kNames{"pack", "disk", "compiled"};
  return kNames.at(static_cast<std::size_t>(source));
}

std::string target_of(const KernelRequest& request) {
  return "sm_" + std::to_string(request.arch) + (request.arch_specific ? "a" : "");
}

std::string content_key(const KernelRequest& request) {
  // Kept: the hash takes longer than all else of a plan whose kernels are loaded, and dropout plans anew for each seed.
  static std::mutex mutex;
  static auto& keys = *std::make_unique<std::unordered_map<std::string, std::string>>().release();
  constexpr std::size_t kMost = 256;
  const std::string what = target_of(request) + "\n" + request.unit;
  const std::lock_guard lock(mutex);
  if (const auto known = keys.find(what); known != keys.end()) return known->second;
  std::string text(build_id);
  for (const char* option : kOptions) text.append(" ").append(option);
  if (keys.size() >= kMost) keys.clear();
  return keys[what] = sha256(text + " " + what).substr(0, 32);
}

int arch_of(int compute_capability) {
  // A GPU runs what was compiled for a smaller minor version of its own major version.
  int best = 0;
  for (const int arch : kArchs) {
    if (arch / 10 == compute_capability / 10 && arch <= compute_capability) best = arch;
  }
  return best;
}

void read_log(const std::string& log, Binary& binary) {
  std::istringstream lines(log);
  for (std::string line; std::getline(lines, line);) {
    binary.spill_bytes += number_before(line, " bytes spill stores") + number_before(line, " bytes spill loads");
    binary.local_bytes += number_before(line, " bytes stack frame");
    if (line.find("Used ") != std::string::npos) {
      binary.registers = std::max(binary.registers, number_before(line, " registers"));
      binary.shared_bytes = std::max(binary.shared_bytes, number_before(line, " bytes smem"));
    }
    std::ranges::replace(line, '"', '\'');  // a record keeps them as JSON
    const bool told = line.starts_with("ptxas info") || line.starts_with("ptxas         .");
    const bool lost = line.find("Potential Performance Loss") != std::string::npos;  // called "info", too
    if ((!told || lost) && line.find_first_not_of(" \t\r") != std::string::npos)
      binary.warnings += (binary.warnings.empty() ? "" : " | ") + line;
  }
}

Compiler nvrtc(const fs::path& folder) {
  const auto name = [memo = folder / "nvrtc", has_memo = !folder.empty()](bool surely) {
    const std::string noted = has_memo ? read_file(memo).value_or("") : "";
    const std::size_t end = noted.find('\n'), next = noted.find('\n', end + 1);
    if (!surely && next != std::string::npos &&
        noted == note_of(noted.substr(0, end), noted.substr(end + 1, next - end - 1))) {
      return noted.substr(0, end);
    }
    const Nvrtc* found = Nvrtc::find();
    if (found == nullptr) return std::string();
    const std::string note = note_of(name_of(*found), found->path());
    if (has_memo && note != noted) (void)write_file(memo, note);
    return name_of(*found);
  };
  return {.name = name, .compile = compile};
}

}  // namespace fovea::cuda::jit
