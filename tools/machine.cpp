#include "machine.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

namespace fovea::tools {
namespace {

constexpr std::array kExtensions{"sse4_2",   "avx",      "f16c",     "fma",      "avx2",        "avx512f",
                                 "avx512bw", "avx512dq", "avx512vl", "avx_vnni", "avx512_bf16", "avx512_fp16",
                                 "amx_tile", "amx_bf16", "amx_int8", "asimd",    "asimdhp",     "asimddp",
                                 "bf16",     "i8mm",     "sve",      "sve2"};

void read_cpuinfo(Processor& processor) {
  std::ifstream stream("/proc/cpuinfo");
  for (std::string line; std::getline(stream, line) && (processor.model.empty() || processor.extensions.empty());) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const std::string key = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    std::istringstream value(line.substr(colon + 1));
    if (key == "model name" && processor.model.empty()) {
      std::getline(value >> std::ws, processor.model);
    } else if (key == "flags" || key == "Features") {
      const std::set<std::string> words{std::istream_iterator<std::string>(value), {}};
      std::ranges::copy_if(kExtensions, std::back_inserter(processor.extensions),
                           [&](const char* extension) { return words.contains(extension); });
    }
  }
  if (processor.model.empty()) processor.model = "unknown";
}

/// Never closed: the libraries of CUDA keep threads and memory of their own.
void* open_library(const char* name) { return ::dlopen(name, RTLD_NOW | RTLD_LOCAL); }

/// Calls a C function of the library; −1 where it has none of that name.
template <typename... Arguments>
int call(void* library, const char* name, Arguments... arguments) {
  using Function = int (*)(Arguments...);
  auto* function = reinterpret_cast<Function>(::dlsym(library, name));
  return function == nullptr ? -1 : function(arguments...);
}

void find_driver(CudaFound& found) {
  void* const cuda = open_library("libcuda.so.1");
  if (cuda == nullptr) {
    found.driver_why = "libcuda.so.1 is not there";
    return;
  }
  int version = 0;
  call(cuda, "cuDriverGetVersion", &version);
  found.driver = fmt::format("{}.{}", version / 1000, version % 1000 / 10);
  if (const int status = call(cuda, "cuInit", 0U); status != 0) {
    found.driver_why = fmt::format("cuInit gives error {}", status);
    return;
  }
  int count = 0;
  call(cuda, "cuDeviceGetCount", &count);
  for (int i = 0; i < count; ++i) {
    constexpr int kMajor = 75, kMinor = 76;  // CUdevice_attribute
    int device = 0, major = 0, minor = 0;
    std::size_t memory = 0;
    std::array<char, 256> name{};
    call(cuda, "cuDeviceGet", &device, i);
    call(cuda, "cuDeviceGetName", name.data(), static_cast<int>(name.size()), device);
    call(cuda, "cuDeviceGetAttribute", &major, kMajor, device);
    call(cuda, "cuDeviceGetAttribute", &minor, kMinor, device);
    call(cuda, "cuDeviceTotalMem_v2", &memory, device);
    found.gpus.push_back({name.data(), major * 10 + minor, static_cast<std::int64_t>(memory)});
  }
}

}  // namespace

Processor processor() {
  Processor found;
  read_cpuinfo(found);
  utsname system{};
  if (::uname(&system) == 0) found.architecture = system.machine;
  const auto ask = [](int name) { return std::max(::sysconf(name), 0L); };
  found.online = ask(_SC_NPROCESSORS_ONLN);
  found.l1_bytes = ask(_SC_LEVEL1_DCACHE_SIZE);
  found.l2_bytes = ask(_SC_LEVEL2_CACHE_SIZE);
  found.l3_bytes = ask(_SC_LEVEL3_CACHE_SIZE);
  found.memory_bytes = ask(_SC_PHYS_PAGES) * ask(_SC_PAGESIZE);
  return found;
}

CudaFound find_cuda() {
  CudaFound found;
  find_driver(found);
  for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"}) {
    void* const nvrtc = open_library(name);
    int major = 0, minor = 0;
    if (nvrtc == nullptr || call(nvrtc, "nvrtcVersion", &major, &minor) != 0) continue;
    found.nvrtc = fmt::format("{}.{}", major, minor);
    break;
  }
  return found;
}

}  // namespace fovea::tools
