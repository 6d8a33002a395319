#include "cuda/nvrtc.h"

#include <dlfcn.h>
#include <fovea/error.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>

#include "cuda/driver.h"

namespace fovea::cuda {
namespace {

namespace fs = std::filesystem;

constexpr int kOldest = 12040;
constexpr int kCompilationFailed = 6;  // nvrtcResult

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

bool is_nvrtc(const fs::path& path) { return path.filename().string().starts_with("libnvrtc.so"); }

/// The Python packages that a library belongs to: .../site-packages.  Empty where it belongs to none.
fs::path python_packages(fs::path path) {
  for (; path.has_relative_path(); path = path.parent_path()) {
    if (path.filename() == "site-packages" || path.filename() == "dist-packages") return path;
  }
  return {};
}

/// Where an NVRTC may be, best first; names without a folder are looked up by the system.
std::vector<std::string> candidates() {
  std::vector<std::string> files;
  const auto add = [&](const std::string& file) {
    if (std::ranges::find(files, file) == files.end()) files.push_back(file);
  };
  const std::vector<fs::path> loaded = loaded_libraries();
  for (const fs::path& path : loaded) {
    if (is_nvrtc(path)) add(path);
  }
  for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"}) {
    add(name);
  }
  for (const fs::path& path : loaded) {
    const fs::path packages = python_packages(path);
    if (packages.empty()) continue;
    for (const char* wheel : {"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"}) {
      std::error_code ignored;
      for (const fs::directory_entry& entry : fs::directory_iterator(packages / wheel, ignored)) {
        if (is_nvrtc(entry.path())) add(entry.path());
      }
    }
  }
  return files;
}

std::string version_text(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

}  // namespace

/// Fills `nvrtc`; returns why not where this file will not do.
std::string Nvrtc::open(const std::string& file, Nvrtc& nvrtc) {
  void* const library = ::dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);  // never closed: it keeps memory of its own
  if (library == nullptr) return "cannot be opened";
  std::string missing;
  const auto bind = [&](auto*& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr) missing = name;
  };
  Functions& call = nvrtc.call_;
  bind(call.version, "nvrtcVersion");
  bind(call.arch_count, "nvrtcGetNumSupportedArchs");
  bind(call.archs, "nvrtcGetSupportedArchs");
  bind(call.error_string, "nvrtcGetErrorString");
  bind(call.create, "nvrtcCreateProgram");
  bind(call.destroy, "nvrtcDestroyProgram");
  bind(call.compile, "nvrtcCompileProgram");
  bind(call.log_size, "nvrtcGetProgramLogSize");
  bind(call.log, "nvrtcGetProgramLog");
  bind(call.cubin_size, "nvrtcGetCUBINSize");
  bind(call.cubin, "nvrtcGetCUBIN");
  if (!missing.empty()) return "has no " + missing;
  int major = 0, minor = 0, count = 0;
  nvrtc.check(call.version(&major, &minor), "nvrtcVersion");
  nvrtc.number_ = major * 1000 + minor * 10;
  nvrtc.version_ = version_text(nvrtc.number_);
  if (nvrtc.number_ < kOldest) return "is " + nvrtc.version_ + ", older than 12.4";
  nvrtc.check(call.arch_count(&count), "nvrtcGetNumSupportedArchs");
  nvrtc.archs_.resize(static_cast<std::size_t>(count));
  nvrtc.check(call.archs(nvrtc.archs_.data()), "nvrtcGetSupportedArchs");
  Dl_info info{};
  const bool named = ::dladdr(reinterpret_cast<void*>(call.version), &info) != 0 && info.dli_fname != nullptr;
  nvrtc.path_ = named ? info.dli_fname : file;
  return {};
}

struct Nvrtc::Found {
  std::optional<Nvrtc> nvrtc;
  std::string why_none;

  Found() {
    const char* set = std::getenv("FOVEA_NVRTC");
    if (set != nullptr && *set != 0) {
      Nvrtc named;
      const std::string why = open(set, named);
      if (why.empty())
        nvrtc = std::move(named);
      else
        why_none = "FOVEA_NVRTC names '" + std::string(set) + "', which " + why + "; name an NVRTC of 12.4 or later";
      return;
    }
    const int driver = driver_version();
    for (const std::string& file : candidates()) {
      Nvrtc candidate;
      const std::string why = open(file, candidate);
      if (why.starts_with("is ")) why_none += (why_none.empty() ? "" : ", ") + file + " " + why;
      if (!why.empty()) continue;
      // A driver takes what compilers of its own major version or an older one make.
      const bool fits = driver == 0 || candidate.number_ / 1000 <= driver / 1000;
      if (fits || !nvrtc) nvrtc = std::move(candidate);
      if (fits) break;
    }
    if (nvrtc)
      why_none.clear();
    else
      why_none = "there is no NVRTC" + (why_none.empty() ? "" : " to use (" + why_none + ")") +
                 ": install it (pip install nvidia-cuda-nvrtc, or the CUDA toolkit) and name its libnvrtc.so in "
                 "FOVEA_NVRTC where it is not found";
  }
};

const Nvrtc::Found& Nvrtc::found() {
  static const Found instance;
  return instance;
}

const Nvrtc* Nvrtc::find() { return found().nvrtc ? &*found().nvrtc : nullptr; }
const std::string& Nvrtc::why_none() { return found().why_none; }

bool Nvrtc::knows(int arch) const { return std::ranges::find(archs_, arch) != archs_.end(); }

void Nvrtc::check(int status, const char* what) const {
  if (status == 0) return;
  throw Error(ErrorCode::kDevice, std::string(what) + " failed: NVRTC " + version_ + " says " +
                                      call_.error_string(status) +
                                      "; look at the memory and the disk, or name another NVRTC in FOVEA_NVRTC");
}

Nvrtc::Result Nvrtc::compile(const std::string& source, const char* file_name, std::span<const Header> headers,
                             std::span<const char* const> options) const {
  std::vector<const char*> names, texts;
  for (const Header& header : headers) {
    names.push_back(header.name);
    texts.push_back(header.text);
  }
  void* program = nullptr;
  check(call_.create(&program, source.c_str(), file_name, static_cast<int>(names.size()), texts.data(), names.data()),
        "nvrtcCreateProgram");
  const auto destroy = [this](void* handle) { call_.destroy(&handle); };
  const std::unique_ptr<void, decltype(destroy)> owner(program, destroy);

  const int status = call_.compile(program, static_cast<int>(options.size()), options.data());
  if (status != 0 && status != kCompilationFailed) check(status, "nvrtcCompileProgram");
  Result result{.done = status == 0, .cubin = {}, .log = {}};
  std::size_t size = 0;
  check(call_.log_size(program, &size), "nvrtcGetProgramLogSize");
  result.log.resize(size);
  check(call_.log(program, result.log.data()), "nvrtcGetProgramLog");
  result.log.resize(result.log.find_last_not_of('\0') + 1);
  std::ranges::replace(result.log, '\0', '\n');  // stands between what compiler and assembler say
  if (!result.done) return result;
  check(call_.cubin_size(program, &size), "nvrtcGetCUBINSize");
  result.cubin.resize(size);
  check(call_.cubin(program, result.cubin.data()), "nvrtcGetCUBIN");
  return result;
}

}  // namespace fovea::cuda
