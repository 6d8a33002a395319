// Stands in for libcuda.so.1 where there is no GPU, so that what the library does with a driver can be seen, and what
// it does when the driver fails.
#include "fake_driver.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#define FAKE extern "C" __attribute__((visibility("default")))

FAKE FakeDriver fake_driver;
FakeDriver fake_driver;

namespace {
int status(const char* function) {
  const auto fault = fake_driver.faults.find(function);
  return fault == fake_driver.faults.end() ? 0 : fault->second;
}
int made(const char* function, void** handle) {
  static char things[4096];
  static std::size_t next = 0;
  if (const int fault = status(function)) return fault;
  *handle = &things[next++];
  return 0;
}
}  // namespace

// NOLINTBEGIN(readability-identifier-naming): the names are the driver's
FAKE int cuInit(unsigned) { return ++fake_driver.started, status("cuInit"); }
FAKE int cuDriverGetVersion(int* version) { return *version = fake_driver.version, 0; }
FAKE int cuGetErrorName(int error, const char** name) {
  *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : "CUDA_ERROR_OTHER";
  return 0;
}
FAKE int cuGetErrorString(int error, const char** text) {
  *text = error == 2 ? "out of memory" : error == 209 ? "no kernel image is available" : "something else";
  return 0;
}
FAKE int cuDeviceGetCount(int* count) { return *count = fake_driver.gpus, status("cuDeviceGetCount"); }
FAKE int cuDeviceGet(int* device, int index) { return *device = index, 0; }
FAKE int cuDeviceGetName(char* name, int, int device) {
  std::memcpy(name, device == 0 ? "Fake A" : "Fake B", sizeof "Fake A");
  return 0;
}
FAKE int cuDeviceGetAttribute(int* value, int which, int device) {
  const int capability = device == 0 ? 90 : 75;
  *value = which == 75 ? capability / 10 : which == 76 ? capability % 10 : which == 97 ? 100'000 : which;
  return status("cuDeviceGetAttribute");
}
FAKE int cuDeviceTotalMem_v2(std::size_t* bytes, int) { return *bytes = 1 << 30, 0; }
FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (const int fault = status("cuDevicePrimaryCtxRetain")) return fault;
  static char contexts[16];
  *context = &contexts[device];
  fake_driver.retained.push_back(*context);
  return 0;
}
FAKE int cuCtxPushCurrent_v2(void* context) { return fake_driver.contexts.push_back(context), 0; }
FAKE int cuCtxPopCurrent_v2(void** context) {
  *context = fake_driver.contexts.back();
  fake_driver.contexts.pop_back();
  return 0;
}
FAKE int cuCtxSynchronize() { return status("cuCtxSynchronize"); }
FAKE int cuModuleLoadData(void** module, const void* image) {
  ++fake_driver.loaded;
  if (std::string_view(static_cast<const char*>(image)).starts_with(fake_driver.refused)) return 209;
  return made("cuModuleLoadData", module);
}
FAKE int cuModuleGetFunction(void** function, void*, const char* name) {
  return std::strcmp(name, "fovea_kernel") == 0 ? made("cuModuleGetFunction", function) : 500;
}
FAKE int cuFuncGetAttribute(int* value, int, void*) { return *value = 1024, 0; }
FAKE int cuFuncSetAttribute(void*, int, int value) { return fake_driver.allowed_shared_bytes = value, 0; }
FAKE int cuLaunchKernel(void*, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void*, void** params, void**) {
  fake_driver.launch = {x, y, z, bx, by, bz, shared};
  fake_driver.launch_contexts = fake_driver.contexts;
  std::memcpy(&fake_driver.launched_with, params[0], sizeof(int));
  return status("cuLaunchKernel");
}
FAKE int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  const auto* sizes = static_cast<const unsigned*>(config);
  ++fake_driver.early_launches;
  return cuLaunchKernel(function, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], nullptr, params,
                        extra);
}
FAKE int cuMemAlloc_v2(void** memory, std::size_t bytes) {
  if (const int fault = status("cuMemAlloc_v2")) return fault;
  ++fake_driver.allocations;
  constexpr std::size_t kAlignment = 256;  // as the driver does
  *memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  return 0;
}
FAKE int cuMemFree_v2(void* memory) {
  ++fake_driver.frees;
  std::free(memory);
  return 0;
}
FAKE int cuMemcpyAsync(void* to, const void* from, std::size_t bytes, void*) { return std::memcpy(to, from, bytes), 0; }
FAKE int cuMemsetD8Async(void* to, unsigned char value, std::size_t bytes, void*) {
  return std::memset(to, value, bytes), 0;
}
FAKE int cuStreamCreate(void** stream, unsigned) { return made("cuStreamCreate", stream); }
FAKE int cuStreamSynchronize(void*) { return status("cuStreamSynchronize"); }
FAKE int cuStreamDestroy_v2(void*) { return ++fake_driver.frees, 0; }
FAKE int cuStreamBeginCapture_v2(void*, int) { return 0; }
FAKE int cuStreamEndCapture(void*, void** graph) { return made("cuStreamEndCapture", graph); }
FAKE int cuGraphInstantiateWithFlags(void** executable, void*, unsigned long long) {
  return made("cuGraphInstantiateWithFlags", executable);
}
FAKE int cuGraphLaunch(void*, void*) { return status("cuGraphLaunch"); }
FAKE int cuGraphDestroy(void*) { return ++fake_driver.frees, 0; }
FAKE int cuGraphExecDestroy(void*) { return ++fake_driver.frees, 0; }
FAKE int cuEventCreate(void** event, unsigned) { return made("cuEventCreate", event); }
FAKE int cuEventRecord(void*, void*) { return 0; }
FAKE int cuEventSynchronize(void*) { return 0; }
FAKE int cuEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 250, 0; }
FAKE int cuEventDestroy_v2(void*) { return ++fake_driver.frees, 0; }
// NOLINTEND(readability-identifier-naming)
