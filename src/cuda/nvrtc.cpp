#include "cuda/nvrtc.h"

#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <optional>

#include "cuda/driver.h"
#include "cuda/library.h"

namespace fovea::cuda {
namespace {

constexpr int kOldest = 12040;
constexpr int kCompilationFailed = 6;  // nvrtcResult

constexpr std::array kNames{"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "/usr/local/cuda/lib64/libnvrtc.so"};
constexpr std::array kWheels{"nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"};

}  // namespace

struct Nvrtc::Functions {
  explicit Functions(const char* file) : library(file) {}
  template <class Signature>
  using Call = LibraryFunction<Signature>;
  using Size = std::size_t;
  using Texts = const char* const*;

  Library library;
  Call<int(int*, int*)> version{library, "nvrtcVersion"};
  Call<int(int*)> arch_count{library, "nvrtcGetNumSupportedArchs"};
  Call<int(int*)> archs{library, "nvrtcGetSupportedArchs"};
  Call<const char*(int)> error_string{library, "nvrtcGetErrorString"};
  Call<int(void**, const char*, const char*, int, Texts, Texts)> create{library, "nvrtcCreateProgram"};
  Call<int(void**)> destroy{library, "nvrtcDestroyProgram"};
  Call<int(void*, int, Texts)> compile{library, "nvrtcCompileProgram"};
  Call<int(void*, Size*)> log_size{library, "nvrtcGetProgramLogSize"};
  Call<int(void*, char*)> log{library, "nvrtcGetProgramLog"};
  Call<int(void*, Size*)> cubin_size{library, "nvrtcGetCUBINSize"};
  Call<int(void*, char*)> cubin{library, "nvrtcGetCUBIN"};
};

std::string Nvrtc::open(const std::string& file) {
  call_ = std::make_shared<const Functions>(file.c_str());
  const Functions& call = *call_;
  if (call.library.handle == nullptr) return "cannot be opened";
  if (!call.library.missing.empty()) return "has no " + call.library.missing;
  int major = 0, minor = 0, count = 0;
  const auto fault = [&](const auto& function, int status) {
    return std::string("fails at ") + function.name + ": " + call.error_string(status);
  };
  if (const int status = call.version(&major, &minor); status != 0) return fault(call.version, status);
  number_ = major * 1000 + minor * 10;
  version_ = std::to_string(major) + "." + std::to_string(minor);
  if (number_ < kOldest) return "is " + version_ + ", older than 12.4";
  if (const int status = call.arch_count(&count); status != 0) return fault(call.arch_count, status);
  archs_.resize(static_cast<std::size_t>(count));
  if (const int status = call.archs(archs_.data()); status != 0) return fault(call.archs, status);
  Dl_info info{};
  const bool named = ::dladdr(reinterpret_cast<void*>(call.version.address), &info) != 0 && info.dli_fname != nullptr;
  path_ = named ? info.dli_fname : file;
  return {};
}

struct Nvrtc::Found {
  std::optional<Nvrtc> nvrtc;
  std::string why_none;

  Found() {
    if (const std::string& file = named(); !file.empty()) {
      Nvrtc candidate;
      const std::string why = candidate.open(file);
      if (why.empty())
        nvrtc = std::move(candidate);
      else
        why_none = "FOVEA_NVRTC names '" + file + "', which " + why + "; name an NVRTC of 12.4 or later";
      return;
    }
    const int driver = driver_version();
    for (const std::string& file : library_candidates("libnvrtc.so", kNames, kWheels)) {
      Nvrtc candidate;
      const std::string why = candidate.open(file);
      if (!why.empty() && candidate.call_->library.handle != nullptr)
        why_none += (why_none.empty() ? "" : ", ") + file + " " + why;
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
  static const auto& instance = *std::make_unique<const Found>().release();  // kept: threads may call at exit
  return instance;
}

const std::string& Nvrtc::named() {
  const auto set = [] { return std::getenv("FOVEA_NVRTC"); };
  static const auto& file = *std::make_unique<const std::string>(set() == nullptr ? "" : set()).release();
  return file;
}
const Nvrtc* Nvrtc::find() { return found().nvrtc ? &*found().nvrtc : nullptr; }
const std::string& Nvrtc::why_none() { return found().why_none; }

bool Nvrtc::knows(int arch) const { return std::ranges::find(archs_, arch) != archs_.end(); }

void Nvrtc::check(int status, const char* what) const {
  if (status == 0) return;
  throw Error(ErrorCode::kDevice, std::string(what) + " failed: NVRTC " + version_ + " says " +
                                      call_->error_string(status) +
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
  check(call_->create(&program, source.c_str(), file_name, static_cast<int>(names.size()), texts.data(), names.data()),
        "nvrtcCreateProgram");
  const auto destroy = [this](void* handle) { call_->destroy(&handle); };
  const std::unique_ptr<void, decltype(destroy)> owner(program, destroy);

  const int status = call_->compile(program, static_cast<int>(options.size()), options.data());
  if (status != 0 && status != kCompilationFailed) check(status, "nvrtcCompileProgram");
  Result result{.done = status == 0, .cubin = {}, .log = {}};
  std::size_t size = 0;
  check(call_->log_size(program, &size), "nvrtcGetProgramLogSize");
  result.log.resize(size);
  check(call_->log(program, result.log.data()), "nvrtcGetProgramLog");
  result.log.resize(result.log.find_last_not_of('\0') + 1);
  std::ranges::replace(result.log, '\0', '\n');  // stands between what compiler and assembler say
  if (!result.done) return result;
  check(call_->cubin_size(program, &size), "nvrtcGetCUBINSize");
  result.cubin.resize(size);
  check(call_->cubin(program, result.cubin.data()), "nvrtcGetCUBIN");
  return result;
}

}  // namespace fovea::cuda
