// Stands in for libcuda.so.1 where there is no GPU: kernels, which the emulator's NVRTC leaves as PTX, run here.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/emulator/tensor_map.h"
#include "tests/emulator/warp.h"

#define EMULATED extern "C" __attribute__((visibility("default")))

namespace {

using namespace fovea::emulator;

constexpr int kInvalid = 1, kNotFound = 500, kLaunchFailed = 719, kInvalidImage = 200;

int setting(const char* name, int otherwise) {
  const char* set = std::getenv(name);
  return set == nullptr ? otherwise : std::atoi(set);
}

struct Gpu {
  std::mutex mutex;
  Memory memory;
  std::vector<std::unique_ptr<Program>> programs;
  std::vector<void*> contexts;
  std::vector<std::function<int()>>* capture = nullptr;
  u32 launches = 0;
};
Gpu& gpu() {
  static Gpu& instance = *std::make_unique<Gpu>().release();  // kept: threads may call at exit
  return instance;
}

using Work = std::vector<std::function<int()>>;
int now_or_captured(std::function<int()> work) {
  if (gpu().capture != nullptr) return gpu().capture->push_back(std::move(work)), 0;
  return work();
}

int run_kernel(const Program& program, Dimensions grid, Dimensions block, u32 shared, std::vector<std::byte> params) {
  const std::lock_guard lock(gpu().mutex);
  Launch launch(program, gpu().memory);
  launch.grid = grid, launch.block = block, launch.shared_bytes = shared;
  launch.params = std::move(params);
  launch.lots.seed(static_cast<u32>(setting("EMULATOR_SEED", 1)) * 7919 + gpu().launches++);
  try {
    run_grid(launch, static_cast<u32>(setting("EMULATOR_SMS", 132)));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulated GPU: %s\n", error.what());
    return kLaunchFailed;
  }
  return 0;
}

}  // namespace

// NOLINTBEGIN(readability-identifier-naming): the names are the driver's
EMULATED int cuInit(unsigned) { return 0; }
// NVRTC asks a driver for it.
EMULATED int cuGetExportTable(const void** table, const void*) { return *table = nullptr, kNotFound; }
EMULATED int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
EMULATED int cuGetErrorName(int error, const char** name) {
  *name = error == kLaunchFailed ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
  return 0;
}
EMULATED int cuGetErrorString(int, const char** text) { return *text = "the emulated GPU's error", 0; }
EMULATED int cuDeviceGetCount(int* count) { return *count = 1, 0; }
EMULATED int cuDeviceGet(int* device, int index) { return *device = index, 0; }
EMULATED int cuDeviceGetName(char* name, int length, int) {
  return std::snprintf(name, static_cast<std::size_t>(length), "emulated GPU"), 0;
}
EMULATED int cuDeviceGetAttribute(int* value, int which, int) {
  const int capability = setting("EMULATOR_ARCH", 90);
  const int shared = capability == 75                                            ? 64 << 10
                     : capability == 80                                          ? 163 << 10
                     : capability == 86 || capability == 89 || capability == 120 ? 99 << 10
                                                                                 : 227 << 10;
  switch (which) {
    case 16:
      return *value = setting("EMULATOR_SMS", 132), 0;
    case 38:
      return *value = 50 << 20, 0;
    case 75:
      return *value = capability / 10, 0;
    case 76:
      return *value = capability % 10, 0;
    case 81:
      return *value = shared + 1024, 0;
    case 97:
      return *value = shared, 0;
    default:
      return *value = 0, 0;
  }
}
EMULATED int cuDeviceTotalMem_v2(std::size_t* bytes, int) { return *bytes = std::size_t{80} << 30, 0; }
EMULATED int cuDevicePrimaryCtxRetain(void** context, int) {
  static char one;
  return *context = &one, 0;
}
EMULATED int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard lock(gpu().mutex);
  return gpu().contexts.push_back(context), 0;
}
EMULATED int cuCtxPopCurrent_v2(void** context) {
  const std::lock_guard lock(gpu().mutex);
  if (gpu().contexts.empty()) return kInvalid;
  *context = gpu().contexts.back();
  gpu().contexts.pop_back();
  return 0;
}
EMULATED int cuCtxSynchronize() { return 0; }
EMULATED int cuModuleLoadData(void** module, const void* image) {
  try {
    auto program = std::make_unique<Program>(static_cast<const char*>(image));
    const std::lock_guard lock(gpu().mutex);
    *module = program.get();
    gpu().programs.push_back(std::move(program));
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulated GPU: %s\n", error.what());
    return kInvalidImage;
  }
}
EMULATED int cuModuleGetFunction(void** function, void* module, const char* name) {
  return std::strcmp(name, "fovea_kernel") == 0 ? (*function = module, 0) : kNotFound;
}
EMULATED int cuFuncGetAttribute(int* value, int, void* function) {
  return *value = static_cast<int>(static_cast<const Program*>(function)->static_shared_bytes), 0;
}
EMULATED int cuFuncSetAttribute(void*, int, int) { return 0; }
EMULATED int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,
                            unsigned shared, void*, void** params, void**) {
  const auto& program = *static_cast<const Program*>(function);
  const auto* first = static_cast<const std::byte*>(params[0]);
  std::vector<std::byte> copy(first, first + program.param_bytes);
  return now_or_captured([=, &program] { return run_kernel(program, {x, y, z}, {bx, by, bz}, shared, copy); });
}
EMULATED int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  const auto* sizes = static_cast<const unsigned*>(config);
  return cuLaunchKernel(function, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], nullptr, params,
                        extra);
}
EMULATED int cuMemAlloc_v2(void** memory, std::size_t bytes) {
  const std::lock_guard lock(gpu().mutex);
  return *memory = gpu().memory.allocate(bytes), 0;
}
EMULATED int cuMemFree_v2(void* memory) {
  const std::lock_guard lock(gpu().mutex);
  return gpu().memory.free(memory) ? 0 : kInvalid;
}
EMULATED int cuMemcpyAsync(void* to, const void* from, std::size_t bytes, void*) {
  return now_or_captured([=] { return std::memcpy(to, from, bytes), 0; });
}
EMULATED int cuMemsetD8Async(void* to, unsigned char value, std::size_t bytes, void*) {
  return now_or_captured([=] { return std::memset(to, value, bytes), 0; });
}
EMULATED int cuStreamCreate(void** stream, unsigned) {
  static char one;
  return *stream = &one, 0;
}
EMULATED int cuStreamSynchronize(void*) { return 0; }
EMULATED int cuStreamDestroy_v2(void*) { return 0; }
EMULATED int cuStreamBeginCapture_v2(void*, int) { return gpu().capture = std::make_unique<Work>().release(), 0; }
EMULATED int cuStreamEndCapture(void*, void** graph) {
  *graph = gpu().capture;
  gpu().capture = nullptr;
  return 0;
}
EMULATED int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return *executable = std::make_unique<Work>(*static_cast<Work*>(graph)).release(), 0;
}
EMULATED int cuGraphLaunch(void* executable, void*) {
  for (const auto& work : *static_cast<Work*>(executable)) {
    if (const int status = work(); status != 0) return status;
  }
  return 0;
}
EMULATED int cuGraphDestroy(void* graph) { return std::unique_ptr<Work>(static_cast<Work*>(graph)), 0; }
EMULATED int cuGraphExecDestroy(void* graph) { return std::unique_ptr<Work>(static_cast<Work*>(graph)), 0; }
EMULATED int cuEventCreate(void** event, unsigned) {
  static char one;
  return *event = &one, 0;
}
EMULATED int cuEventRecord(void*, void*) { return 0; }
EMULATED int cuEventSynchronize(void*) { return 0; }
EMULATED int cuEventElapsedTime(float* milliseconds, void*, void*) { return *milliseconds = 1, 0; }
EMULATED int cuEventDestroy_v2(void*) { return 0; }
EMULATED int cuTensorMapEncodeTiled(void* to, int type, unsigned rank, void* address, const unsigned long long* sizes,
                                    const unsigned long long* strides, const unsigned* box, const unsigned*, int,
                                    int swizzle, int, int) {
  constexpr int kSwizzle128 = 3, kFloat32 = 7;
  if (rank < 4 || rank > TensorMap::kMostDimensions || swizzle != kSwizzle128 ||
      reinterpret_cast<std::uintptr_t>(address) % 16 != 0)
    return kInvalid;
  TensorMap map{};
  map.magic = TensorMap::kMagic;
  map.address = reinterpret_cast<std::uint64_t>(address);
  map.rank = rank;
  map.sizes.fill(1), map.box.fill(1);
  for (std::size_t n = 0; n < rank; ++n) map.sizes.at(n) = sizes[n], map.box.at(n) = box[n];
  for (std::size_t n = 0; n + 1 < rank; ++n) {
    if (strides[n] % 16 != 0) return kInvalid;
    map.strides.at(n) = strides[n];
  }
  map.element = type == kFloat32 ? 4 : 2;
  std::memcpy(to, &map, sizeof map);
  return 0;
}
// NOLINTEND(readability-identifier-naming)
