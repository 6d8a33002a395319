// Stands in for NVRTC: the one that EMULATOR_NVRTC names compiles, and what is given back as a kernel is its PTX.
#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace {

/// NVRTC's function of that name.
template <class Function>
Function* real(const char* name) {
  static void* const library = [] {
    const char* file = std::getenv("EMULATOR_NVRTC");
    return file == nullptr ? nullptr : ::dlopen(file, RTLD_NOW | RTLD_LOCAL);
  }();
  return library == nullptr ? nullptr : reinterpret_cast<Function*>(::dlsym(library, name));
}

using Texts = const char* const*;
constexpr int kInternalError = 11;

template <class... Arguments>
int call(const char* name, Arguments... arguments) {
  auto* function = real<int(Arguments...)>(name);
  return function == nullptr ? kInternalError : function(arguments...);
}

}  // namespace

#define EMULATED extern "C" __attribute__((visibility("default")))
// NOLINTBEGIN(readability-identifier-naming): the names are NVRTC's
EMULATED int nvrtcVersion(int* major, int* minor) { return call("nvrtcVersion", major, minor); }
EMULATED int nvrtcGetNumSupportedArchs(int* count) { return call("nvrtcGetNumSupportedArchs", count); }
EMULATED int nvrtcGetSupportedArchs(int* archs) { return call("nvrtcGetSupportedArchs", archs); }
EMULATED const char* nvrtcGetErrorString(int error) {
  auto* function = real<const char*(int)>("nvrtcGetErrorString");
  return function == nullptr ? "EMULATOR_NVRTC names no NVRTC" : function(error);
}
EMULATED int nvrtcCreateProgram(void** program, const char* text, const char* name, int count, Texts headers,
                                Texts names) {
  return call("nvrtcCreateProgram", program, text, name, count, headers, names);
}
EMULATED int nvrtcDestroyProgram(void** program) { return call("nvrtcDestroyProgram", program); }
EMULATED int nvrtcCompileProgram(void* program, int count, Texts options) {
  std::vector<std::string> kept;
  kept.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    std::string option = options[i];
    if (option.starts_with("--ptxas-options")) continue;
    if (option.starts_with("-arch=sm_")) option.replace(6, 2, "compute");
    kept.push_back(std::move(option));
  }
  std::vector<const char*> texts;
  texts.reserve(kept.size());
  for (const std::string& option : kept) texts.push_back(option.c_str());
  return call("nvrtcCompileProgram", program, static_cast<int>(texts.size()), static_cast<Texts>(texts.data()));
}
EMULATED int nvrtcGetProgramLogSize(void* program, std::size_t* size) {
  return call("nvrtcGetProgramLogSize", program, size);
}
EMULATED int nvrtcGetProgramLog(void* program, char* log) { return call("nvrtcGetProgramLog", program, log); }
EMULATED int nvrtcGetCUBINSize(void* program, std::size_t* size) { return call("nvrtcGetPTXSize", program, size); }
EMULATED int nvrtcGetCUBIN(void* program, char* text) { return call("nvrtcGetPTX", program, text); }
// NOLINTEND(readability-identifier-naming)
