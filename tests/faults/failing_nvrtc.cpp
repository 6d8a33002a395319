// Stands in for a libnvrtc that has every function and fails at the first.
#define FAKE extern "C" __attribute__((visibility("default")))

// NOLINTBEGIN(readability-identifier-naming): the names are NVRTC's
FAKE int nvrtcVersion(int*, int*) { return 1; }
FAKE const char* nvrtcGetErrorString(int) { return "NVRTC_ERROR_OUT_OF_MEMORY"; }
#define UNUSED(function) \
  FAKE int function() { return 1; }
UNUSED(nvrtcGetNumSupportedArchs)
UNUSED(nvrtcGetSupportedArchs)
UNUSED(nvrtcCreateProgram)
UNUSED(nvrtcDestroyProgram)
UNUSED(nvrtcCompileProgram)
UNUSED(nvrtcGetProgramLogSize)
UNUSED(nvrtcGetProgramLog)
UNUSED(nvrtcGetCUBINSize)
UNUSED(nvrtcGetCUBIN)
// NOLINTEND(readability-identifier-naming)
