#include "cuda/jit/cache.h"

#include <dlfcn.h>
#include <fovea/error.h>

#include <algorithm>
#include <cstdlib>

namespace fovea::cuda::jit {
namespace {

namespace fs = std::filesystem;

std::string variable(const char* name) {
  const char* set = std::getenv(name);
  return set == nullptr ? "" : set;
}

Mode mode_of_environment() {
  const std::string set = variable("FOVEA_JIT");
  if (set.empty() || set == "on") return Mode::kOn;
  if (set == "cache") return Mode::kCache;
  if (set == "off") return Mode::kOff;
  throw Error(ErrorCode::kInvalidArgument, "FOVEA_JIT ('" + set + "') must be on, cache or off");
}

fs::path folder_of_environment() {
  std::error_code ignored;
  if (const std::string own = variable("FOVEA_CACHE_DIR"); !own.empty()) return fs::absolute(own, ignored);
  // The XDG specification wants absolute paths and tells to ignore others.
  if (const fs::path base = variable("XDG_CACHE_HOME"); base.is_absolute()) return base / "fovea";
  if (const fs::path home = variable("HOME"); home.is_absolute()) return home / ".cache" / "fovea";
  return {};
}

std::string called(const KernelRequest& request) {
  return "kernel " + request.name + " for sm_" + std::to_string(request.arch);
}

}  // namespace

Kernel::Kernel(std::shared_ptr<const Binary> binary, int gpu)
    : binary_(std::move(binary)),
      gpu_(gpu),
      function_(load_function(gpu, binary_->cubin, kEntryPoint, binary_->name,
                              binary_->compiler + " (" + jit::name(binary_->source) + ")")) {}

fs::path shipped_pack() {
  Dl_info info{};
  if (::dladdr(reinterpret_cast<void*>(&shipped_pack), &info) == 0 || info.dli_fname == nullptr) return {};
  fs::path file = info.dli_fname;
  if (!file.has_parent_path()) file = "/proc/self/exe";  // a program that PATH has found, by its bare name
  std::error_code ignored;
  return fs::weakly_canonical(file, ignored).parent_path() / "fovea.pack";
}

Cache::Options Cache::options_of_environment() {
  Options options{.mode = mode_of_environment(), .folder = folder_of_environment(), .packs = {}, .compiler = {}};
  options.compiler = nvrtc(options.folder);
  const std::string named = variable("FOVEA_PACK");
  std::error_code ignored;
  if (!named.empty()) {
    options.packs.push_back(fs::absolute(named, ignored));
  } else if (const fs::path shipped = shipped_pack(); fs::exists(shipped, ignored)) {
    options.packs.push_back(shipped);
  }
  return options;
}

Cache::Cache(Options options)
    : mode_(options.mode), disk_(std::move(options.folder)), compiler_(std::move(options.compiler)) {
  for (const fs::path& file : options.packs) packs_.push_back(Pack::open(file));
}

Cache& Cache::shared() {
  // Kept: threads may call at exit.
  static auto& instance = *std::make_unique<Cache>(options_of_environment()).release();
  return instance;
}

std::shared_ptr<const Binary> Cache::look(const KernelRequest& request, const std::string& key) const {
  for (const Pack& pack : packs_) {
    if (std::optional<Binary> found = pack.find(key)) return std::make_shared<const Binary>(std::move(*found));
  }
  if (mode_ == Mode::kOff) return nullptr;
  // Another compiler's kernel is as right, but where there is a compiler it should be this one's.
  const std::string compiler = mode_ == Mode::kOn ? compiler_.name(false) : "";
  std::optional<Binary> found = disk_.find(request, key, compiler);
  return found ? std::make_shared<const Binary>(std::move(*found)) : nullptr;
}

std::shared_ptr<const Binary> Cache::obtain(const KernelRequest& request, const std::string& key) const {
  if (auto found = look(request, key)) return found;
  if (mode_ != Mode::kOn) {
    const auto damaged = std::ranges::find_if(packs_, [&](const Pack& pack) { return pack.lists(key); });
    const std::string where = damaged == packs_.end() ? "in no pack" : "damaged in pack " + damaged->file().string();
    throw Error(ErrorCode::kUnsupported, called(request) + " is " + where +
                                             (mode_ == Mode::kCache ? " and not in the cache" : "") +
                                             ", and FOVEA_JIT=" + (mode_ == Mode::kCache ? "cache" : "off") +
                                             " forbids compiling it; set FOVEA_JIT=on, or make it by fovea precompile");
  }
  return compile(request, key);
}

std::shared_ptr<const Binary> Cache::compile(const KernelRequest& request, const std::string& key) const {
  if (compiler_.name(true).empty())
    return std::make_shared<const Binary>(compiler_.compile(request));  // says why there is none
  const FileLock lock = disk_.lock(request.arch, key);
  if (auto made_meanwhile = disk_.find(request, key, compiler_.name(true)))
    return std::make_shared<const Binary>(std::move(*made_meanwhile));
  auto compiled = std::make_shared<const Binary>(compiler_.compile(request));
  disk_.store(*compiled);
  return compiled;
}

std::shared_ptr<const Binary> Cache::binary(const KernelRequest& request) {
  const std::string key = content_key(request);
  return binaries_.get(key, [&] { return obtain(request, key); });
}

std::shared_ptr<const Binary> Cache::find(const KernelRequest& request) {
  const std::string key = content_key(request);
  return binaries_.get(key, [&] { return look(request, key); });
}

const Kernel& Cache::load(const KernelRequest& request, int gpu) {
  const std::string key = content_key(request);
  const auto made = [&]() -> std::shared_ptr<const Kernel> {
    const std::shared_ptr<const Binary> known = binary(request);
    std::optional<Error> failure;
    try {
      return std::make_shared<const Kernel>(known, gpu);
    } catch (const RefusedKernel& refusal) {  // a stored one of another compiler: the driver may take what is made here
      failure = refusal;
    }
    if (mode_ == Mode::kOn && known->compiler != compiler_.name(true)) {
      try {
        return std::make_shared<const Kernel>(compile(request, key), gpu);
      } catch (const Error& error) {
        failure = Error(error.code(),
                        failure->what() + std::string("; and one compiled here does not serve: ") + error.what());
      }
    }
    std::shared_ptr<const Kernel> another;
    const auto loads = [&](const Binary& stored) {
      try {
        another = std::make_shared<const Kernel>(std::make_shared<const Binary>(stored), gpu);
      } catch (const RefusedKernel&) {  // perhaps the next one
      }
      return another != nullptr;
    };
    if (mode_ != Mode::kOff && disk_.find(request, key, "", loads)) return another;
    throw Error(*failure);
  };
  return *kernels_.get({key, gpu}, made);
}

TileChoices& Cache::tiles(const std::string& gpu) {
  const std::lock_guard lock(tiles_mutex_);
  std::unique_ptr<TileChoices>& choices = tiles_[gpu];
  if (choices == nullptr)
    choices = std::make_unique<TileChoices>(mode_ == Mode::kOff ? fs::path() : disk_.tiles_of(gpu));
  return *choices;
}

}  // namespace fovea::cuda::jit
