// Stands in for libcuda.so.1: a GPU whose memory is the host's and whose kernels are the layers', run by the CPU thread
// by thread.  A cubin is a kernel's name.  Memory that was not written, or was given back, is full of NaN.
#include <ucontext.h>

#include <array>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "nn/cuda/kernels/elements.cuh"
#include "nn/cuda/kernels/rows.cuh"

#define FAKE extern "C" __attribute__((visibility("default")))

// ---- threads of a block: fibers that take turns

namespace emulated {
namespace {

constexpr unsigned kThreads = fovea::cuda::kLayerThreads;
constexpr std::size_t kStackBytes = 1 << 16;

struct Block {
  Index index{};
  unsigned thread = 0;
  std::function<void()> kernel;
  ucontext_t scheduler{};
  std::array<ucontext_t, kThreads> threads{};
  std::array<bool, kThreads> done{};
  std::array<double, kThreads> given{};
  std::vector<char> stacks = std::vector<char>(kThreads * kStackBytes);
};
Block block;

void run_thread() {
  block.kernel();
  block.done[block.thread] = true;
  while (true) await();
}

/// In rounds: each thread goes on to its next wait, so that a round is a barrier.
void run_block() {
  for (unsigned i = 0; i < kThreads; ++i) {
    block.done[i] = false;
    ucontext_t& context = block.threads[i];
    getcontext(&context);
    context.uc_stack.ss_sp = block.stacks.data() + i * kStackBytes;
    context.uc_stack.ss_size = kStackBytes;
    makecontext(&context, run_thread, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < kThreads; ++i) {
      if (block.done[i]) continue;
      any = true;
      block.thread = i;
      swapcontext(&block.scheduler, &block.threads[i]);
    }
  }
}

template <class Number>
Number exchanged(Number x, int step) {
  block.given[block.thread] = static_cast<double>(x);
  await();
  const auto other = static_cast<Number>(block.given[block.thread ^ static_cast<unsigned>(step)]);
  await();
  return other;
}

}  // namespace

Index thread_index() { return {block.thread, 0}; }
Index block_index() { return block.index; }
void await() { swapcontext(&block.threads[block.thread], &block.scheduler); }
float of_lane(float x, int step) { return exchanged(x, step); }
int of_lane(int x, int step) { return exchanged(x, step); }

}  // namespace emulated

// ---- kernels by their names

namespace {

using namespace fovea::cuda;

template <class Params, void (*kKernel)(const Params&)>
void launch(unsigned x, unsigned y, const void* given) {
  const Params params = *static_cast<const Params*>(given);
  emulated::block.kernel = [&] { kKernel(params); };
  for (unsigned row = 0; row < y; ++row) {
    for (unsigned column = 0; column < x; ++column) {
      emulated::block.index = {column, row};
      emulated::run_block();
    }
  }
}

using Launch = void (*)(unsigned x, unsigned y, const void* params);

template <LayerSpec S>
Launch kernel_of(const std::string& name) {
  static const std::map<std::string, Launch> kernels{{"finish", launch<FinishParams, finish<S>>},
                                                     {"finish_gradient", launch<FinishParams, finish_gradient<S>>},
                                                     {"norm", launch<NormParams, norm<S>>},
                                                     {"norm_gradient", launch<NormParams, norm_gradient<S>>},
                                                     {"column_sums", launch<ColumnSumParams, column_sums<S>>},
                                                     {"add_up", launch<AddUpParams, add_up<S>>},
                                                     {"rotate", launch<RotateParams, rotate<S>>},
                                                     {"squares", launch<LossParams, squares<S>>},
                                                     {"entropies", launch<LossParams, entropies<S>>},
                                                     {"adamw", launch<AdamWParams, adamw<S>>},
                                                     {"pointwise", launch<PointwiseParams, pointwise<S>>},
                                                     {"place_rows", launch<PlaceParams, place_rows<S>>},
                                                     {"lengths", launch<LengthsParams, lengths<S>>},
                                                     {"put", launch<PutParams, put<S>>},
                                                     {"move_rows", launch<MoveRowsParams, move_rows<S>>}};
  return kernels.at(name);
}

/// Of a name like "norm_gradient_bf16".
Launch kernel_of_cubin(const std::string& cubin) {
  const std::size_t end = cubin.rfind('_');
  const std::string name = cubin.substr(0, end), type = cubin.substr(end + 1);
  if (type == "fp16") return kernel_of<LayerSpec{Type::kFloat16}>(name);
  if (type == "bf16") return kernel_of<LayerSpec{Type::kBFloat16}>(name);
  return kernel_of<LayerSpec{Type::kFloat32}>(name);
}

// ---- memory

struct Memory {
  std::map<void*, std::size_t> sizes;
  std::size_t used = 0, most = 0;
};
Memory memory;
std::deque<std::string> modules;
std::mutex mutex;  // of everything here
char something;    // what handles point to

constexpr int kAlignment = 256, kPoison = 0xff, kUsedHigh = 8;

}  // namespace

// NOLINTBEGIN(readability-identifier-naming): the names are the driver's
FAKE int cuInit(unsigned) { return 0; }
FAKE int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
FAKE int cuGetErrorName(int, const char** name) { return *name = "CUDA_ERROR", 0; }
FAKE int cuGetErrorString(int, const char** text) { return *text = "an error", 0; }
FAKE int cuDeviceGetCount(int* count) { return *count = 1, 0; }
FAKE int cuDeviceGet(int* device, int index) { return *device = index, 0; }
FAKE int cuDeviceGetName(char* name, int, int) { return std::memcpy(name, "Emulated", sizeof "Emulated"), 0; }
FAKE int cuDeviceGetAttribute(int* value, int which, int) {
  return *value = which == 75 ? 9 : which == 76 ? 0 : 1 << 16, 0;
}
FAKE int cuDeviceTotalMem_v2(std::size_t* bytes, int) { return *bytes = std::size_t{1} << 36, 0; }
FAKE int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &something, 0; }
FAKE int cuCtxPushCurrent_v2(void*) { return 0; }
FAKE int cuCtxPopCurrent_v2(void**) { return 0; }
FAKE int cuCtxSynchronize() { return 0; }
FAKE int cuModuleLoadData(void** module, const void* image) {
  const std::lock_guard lock(mutex);
  modules.emplace_back(static_cast<const char*>(image));
  *module = &modules.back();
  return 0;
}
FAKE int cuModuleGetFunction(void** function, void* module, const char*) { return *function = module, 0; }
FAKE int cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
FAKE int cuFuncSetAttribute(void*, int, int) { return 0; }
FAKE int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned, unsigned threads, unsigned, unsigned,
                        unsigned, void* stream, void** params, void**) {
  const std::lock_guard lock(mutex);
  if (threads != emulated::kThreads || stream != nullptr) return 1;
  kernel_of_cubin (*static_cast<const std::string*>(function))(x, y, params[0]);
  return 0;
}
FAKE int cuLaunchKernelEx(const void* config, void* function, void** params, void** extra) {
  const auto* sizes = static_cast<const unsigned*>(config);
  return cuLaunchKernel(function, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], nullptr, params,
                        extra);
}
FAKE int cuMemPoolCreate(void** pool, const void*) { return *pool = &something, 0; }
FAKE int cuMemPoolSetAttribute(void*, int which, void*) {
  const std::lock_guard lock(mutex);
  if (which == kUsedHigh) memory.most = memory.used;
  return 0;
}
FAKE int cuMemPoolGetAttribute(void*, int which, void* value) {
  if (which != kUsedHigh) return 1;
  return *static_cast<std::uint64_t*>(value) = memory.most, 0;
}
FAKE int cuMemAllocFromPoolAsync(void** pointer, std::size_t bytes, void*, void*) {
  const std::lock_guard lock(mutex);
  *pointer = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(*pointer, kPoison, bytes);
  memory.sizes[*pointer] = bytes;
  memory.most = std::max(memory.most, memory.used += bytes);
  return 0;
}
FAKE int cuMemFreeAsync(void* pointer, void*) {
  const std::lock_guard lock(mutex);
  const auto place = memory.sizes.find(pointer);
  if (place == memory.sizes.end()) return 1;
  std::memset(pointer, kPoison, place->second);
  memory.used -= place->second;
  memory.sizes.erase(place);
  std::free(pointer);
  return 0;
}
FAKE int cuMemcpyAsync(void* to, const void* from, std::size_t bytes, void*) { return std::memcpy(to, from, bytes), 0; }
FAKE int cuMemsetD8Async(void* to, unsigned char value, std::size_t bytes, void*) {
  return std::memset(to, value, bytes), 0;
}

// What the layers do not use, but the driver has.
#define FOVEA_UNUSED(name) \
  FAKE int name() { return 1; }
FOVEA_UNUSED(cuMemAlloc_v2)
FOVEA_UNUSED(cuMemFree_v2)
FOVEA_UNUSED(cuStreamCreate)
FOVEA_UNUSED(cuStreamSynchronize)
FOVEA_UNUSED(cuStreamDestroy_v2)
FOVEA_UNUSED(cuStreamBeginCapture_v2)
FOVEA_UNUSED(cuStreamEndCapture)
FOVEA_UNUSED(cuGraphInstantiateWithFlags)
FOVEA_UNUSED(cuGraphLaunch)
FOVEA_UNUSED(cuGraphDestroy)
FOVEA_UNUSED(cuGraphExecDestroy)
FOVEA_UNUSED(cuEventCreate)
FOVEA_UNUSED(cuEventRecord)
FOVEA_UNUSED(cuEventSynchronize)
FOVEA_UNUSED(cuEventElapsedTime)
FOVEA_UNUSED(cuEventDestroy_v2)
// NOLINTEND(readability-identifier-naming)
