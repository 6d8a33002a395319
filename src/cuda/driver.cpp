#include "cuda/driver.h"

#include <dlfcn.h>
#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

namespace fovea::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kOutOfMemory = 2;                                        // CUresult
constexpr std::array kForeignImage{200, 209, 218, 220, 222, 223};      // CUresult: images this driver cannot load
constexpr int kSmCount = 16, kL2Bytes = 38, kMajor = 75, kMinor = 76;  // CUdevice_attribute
constexpr int kSharedPerSm = 81, kSharedPerBlock = 97;
constexpr int kStaticSharedBytes = 1, kMaxDynamicSharedBytes = 8;  // CUfunction_attribute
constexpr unsigned kNonBlocking = 1;                               // CUstream_flags
constexpr int kThreadLocalCapture = 1;                             // CUstreamCaptureMode

/// What we use of cuda.h, version suffixes and all.
struct Functions {
  int (*init)(unsigned);
  int (*version)(int*);
  int (*error_name)(int, const char**);
  int (*error_string)(int, const char**);
  int (*device_count)(int*);
  int (*device)(int*, int);
  int (*device_name)(char*, int, int);
  int (*device_attribute)(int*, int, int);
  int (*device_memory)(std::size_t*, int);
  int (*retain_context)(void**, int);
  int (*push_context)(void*);
  int (*pop_context)(void**);
  int (*synchronize_context)();
  int (*load_module)(void**, const void*);
  int (*module_function)(void**, void*, const char*);
  int (*function_attribute)(int*, int, void*);
  int (*set_function_attribute)(void*, int, int);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*allocate)(void**, std::size_t);
  int (*free)(void*);
  int (*to_device)(void*, const void*, std::size_t);
  int (*to_host)(void*, const void*, std::size_t);
  int (*copy_async)(void*, const void*, std::size_t, void*);
  int (*fill)(void*, unsigned char, std::size_t);
  int (*fill_async)(void*, unsigned char, std::size_t, void*);
  int (*make_stream)(void**, unsigned);
  int (*synchronize_stream)(void*);
  int (*destroy_stream)(void*);
  int (*begin_capture)(void*, int);
  int (*end_capture)(void*, void**);
  int (*make_executable)(void**, void*, unsigned long long);
  int (*launch_graph)(void*, void*);
  int (*destroy_graph)(void*);
  int (*destroy_executable)(void*);
  int (*make_event)(void**, unsigned);
  int (*record_event)(void*, void*);
  int (*synchronize_event)(void*);
  int (*event_milliseconds)(float*, void*, void*);
  int (*destroy_event)(void*);
};

struct Driver {
  Functions call{};
  int version = 0;
  std::string why_not;  // empty: the driver works
  std::vector<Gpu> gpus;
  std::unique_ptr<std::once_flag[]> once;
  std::vector<void*> contexts;

  Driver();
  void bind(void* library);
  void find_gpus();
};

std::string words(const Functions& call, int status) {
  const char *name = nullptr, *text = nullptr;
  call.error_name(status, &name);
  call.error_string(status, &text);
  return std::string(text == nullptr ? "unknown error" : text) + " (" +
         (name == nullptr ? "error " + std::to_string(status) : name) + ")";
}

Driver::Driver() {
  void* const library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);  // never closed: it keeps threads of its own
  if (library == nullptr) {
    why_not = std::string("no NVIDIA driver here: ") + kLibrary + " cannot be opened";
    return;
  }
  bind(library);
  if (!why_not.empty()) return;
  call.version(&version);
  if (const int status = call.init(0); status != 0) {
    why_not = "the NVIDIA driver does not start: cuInit says " + words(call, status);
    return;
  }
  find_gpus();
}

void Driver::bind(void* library) {
  const auto bind = [&](auto*& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
    if (function == nullptr && why_not.empty()) {
      why_not = std::string("the NVIDIA driver is too old: its ") + kLibrary + " has no " + name + "; update it";
    }
  };
  bind(call.init, "cuInit");
  bind(call.version, "cuDriverGetVersion");
  bind(call.error_name, "cuGetErrorName");
  bind(call.error_string, "cuGetErrorString");
  bind(call.device_count, "cuDeviceGetCount");
  bind(call.device, "cuDeviceGet");
  bind(call.device_name, "cuDeviceGetName");
  bind(call.device_attribute, "cuDeviceGetAttribute");
  bind(call.device_memory, "cuDeviceTotalMem_v2");
  bind(call.retain_context, "cuDevicePrimaryCtxRetain");
  bind(call.push_context, "cuCtxPushCurrent_v2");
  bind(call.pop_context, "cuCtxPopCurrent_v2");
  bind(call.synchronize_context, "cuCtxSynchronize");
  bind(call.load_module, "cuModuleLoadData");
  bind(call.module_function, "cuModuleGetFunction");
  bind(call.function_attribute, "cuFuncGetAttribute");
  bind(call.set_function_attribute, "cuFuncSetAttribute");
  bind(call.launch, "cuLaunchKernel");
  bind(call.allocate, "cuMemAlloc_v2");
  bind(call.free, "cuMemFree_v2");
  bind(call.to_device, "cuMemcpyHtoD_v2");
  bind(call.to_host, "cuMemcpyDtoH_v2");
  bind(call.copy_async, "cuMemcpyAsync");
  bind(call.fill, "cuMemsetD8_v2");
  bind(call.fill_async, "cuMemsetD8Async");
  bind(call.make_stream, "cuStreamCreate");
  bind(call.synchronize_stream, "cuStreamSynchronize");
  bind(call.destroy_stream, "cuStreamDestroy_v2");
  bind(call.begin_capture, "cuStreamBeginCapture_v2");
  bind(call.end_capture, "cuStreamEndCapture");
  bind(call.make_executable, "cuGraphInstantiateWithFlags");
  bind(call.launch_graph, "cuGraphLaunch");
  bind(call.destroy_graph, "cuGraphDestroy");
  bind(call.destroy_executable, "cuGraphExecDestroy");
  bind(call.make_event, "cuEventCreate");
  bind(call.record_event, "cuEventRecord");
  bind(call.synchronize_event, "cuEventSynchronize");
  bind(call.event_milliseconds, "cuEventElapsedTime");
  bind(call.destroy_event, "cuEventDestroy_v2");
}

void Driver::find_gpus() {
  int count = 0;
  call.device_count(&count);
  for (int i = 0; i < count; ++i) {
    int device = 0;
    call.device(&device, i);
    const auto attribute = [&](int which) {
      int value = 0;
      call.device_attribute(&value, which, device);
      return value;
    };
    std::array<char, 256> name{};
    std::size_t memory = 0;
    call.device_name(name.data(), static_cast<int>(name.size()), device);
    call.device_memory(&memory, device);
    gpus.push_back({.name = name.data(),
                    .compute_capability = attribute(kMajor) * 10 + attribute(kMinor),
                    .sm_count = attribute(kSmCount),
                    .memory_bytes = static_cast<std::int64_t>(memory),
                    .l2_bytes = attribute(kL2Bytes),
                    .shared_bytes_per_sm = attribute(kSharedPerSm),
                    .shared_bytes_per_block = attribute(kSharedPerBlock)});
  }
  if (gpus.empty()) why_not = "the NVIDIA driver sees no GPU";
  once = std::make_unique<std::once_flag[]>(gpus.size());
  contexts.resize(gpus.size());
}

/// Made on first use, and only read after; but for the contexts, each behind its once_flag.
Driver& driver() {
  static Driver instance;
  return instance;
}

std::string on(int gpu) { return " on GPU " + std::to_string(gpu); }

void check(int status, const std::string& what) {
  if (status == 0) return;
  throw Error(status == kOutOfMemory ? ErrorCode::kOutOfMemory : ErrorCode::kDevice,
              what + " failed: the driver says " + words(driver().call, status));
}

/// The one place where a GPU that is not there is refused.
Driver& driver_with(int index) {
  Driver& found = driver();
  if (!found.why_not.empty()) throw Error(ErrorCode::kDevice, found.why_not);
  const int count = static_cast<int>(found.gpus.size());
  if (index < 0 || index >= count) {
    throw Error(ErrorCode::kInvalidArgument,
                "cuda:" + std::to_string(index) +
                    " is not there; this machine's last GPU is cuda:" + std::to_string(count - 1));
  }
  return found;
}

Handle made(int gpu, const std::string& what, int (*release)(void*), const std::function<int(void**)>& make) {
  const CurrentGpu current(gpu);
  void* handle = nullptr;
  check(make(&handle), what + on(gpu));
  return {handle, Release{gpu, release}};
}

}  // namespace

const std::string& why_no_driver() { return driver().why_not; }
int driver_version() { return driver().version; }
int gpu_count() { return static_cast<int>(driver().gpus.size()); }
const Gpu& gpu(int index) { return driver_with(index).gpus[static_cast<std::size_t>(index)]; }

CurrentGpu::CurrentGpu(int index) {
  Driver& found = driver_with(index);
  const auto i = static_cast<std::size_t>(index);
  std::call_once(found.once[i], [&] {
    int device = 0;
    check(found.call.device(&device, index), "cuDeviceGet of GPU " + std::to_string(index));
    check(found.call.retain_context(&found.contexts[i], device), "cuDevicePrimaryCtxRetain" + on(index));
  });
  check(found.call.push_context(found.contexts[i]), "cuCtxPushCurrent" + on(index));
}

CurrentGpu::~CurrentGpu() {
  void* popped = nullptr;
  driver().call.pop_context(&popped);
}

void Release::operator()(void* handle) const {
  try {
    const CurrentGpu current(gpu);
    function(handle);
  } catch (const Error&) {  // a GPU that has failed has nothing to take back
  }
}

DeviceMemory::DeviceMemory(int gpu, std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const Functions& call = driver_with(gpu).call;
  memory_ = made(gpu, "cuMemAlloc of " + std::to_string(bytes) + " bytes", call.free,
                 [&](void** memory) { return call.allocate(memory, bytes); });
}

void DeviceMemory::upload(const void* from, std::size_t bytes) const {
  if (bytes == 0) return;
  const CurrentGpu current(memory_.get_deleter().gpu);
  check(driver().call.to_device(data(), from, bytes),
        "cuMemcpyHtoD of " + std::to_string(bytes) + " bytes" + on(memory_.get_deleter().gpu));
}

void DeviceMemory::download(void* to, std::size_t bytes) const {
  if (bytes == 0) return;
  const CurrentGpu current(memory_.get_deleter().gpu);
  check(driver().call.to_host(to, data(), bytes),
        "cuMemcpyDtoH of " + std::to_string(bytes) + " bytes" + on(memory_.get_deleter().gpu));
}

void DeviceMemory::fill(std::uint8_t value) const {
  if (bytes_ == 0) return;
  const int gpu = memory_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  check(driver().call.fill(data(), value, bytes_), "cuMemsetD8 of " + std::to_string(bytes_) + " bytes" + on(gpu));
  check(driver().call.synchronize_stream(nullptr), "cuStreamSynchronize" + on(gpu));
}

Stream::Stream(int gpu)
    : stream_(made(gpu, "cuStreamCreate", driver().call.destroy_stream,
                   [](void** stream) { return driver().call.make_stream(stream, kNonBlocking); })) {}

void Stream::synchronize() const {
  const int gpu = stream_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  check(driver().call.synchronize_stream(get()), "cuStreamSynchronize" + on(gpu));
}

Event::Event(int gpu)
    : event_(made(gpu, "cuEventCreate", driver().call.destroy_event,
                  [](void** event) { return driver().call.make_event(event, 0); })) {}

void Event::record(void* stream) const {
  const int gpu = event_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  check(driver().call.record_event(event_.get(), stream), "cuEventRecord" + on(gpu));
}

void Event::synchronize() const {
  const int gpu = event_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  check(driver().call.synchronize_event(event_.get()), "cuEventSynchronize" + on(gpu));
}

double Event::seconds_since(const Event& start) const {
  const int gpu = event_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  float milliseconds = 0;
  check(driver().call.event_milliseconds(&milliseconds, start.event_.get(), event_.get()),
        "cuEventElapsedTime" + on(gpu));
  return static_cast<double>(milliseconds) * 1e-3;
}

Graph::Graph(int gpu, const Stream& stream, const std::function<void()>& work) {
  const CurrentGpu current(gpu);
  const Functions& call = driver().call;
  check(call.begin_capture(stream.get(), kThreadLocalCapture), "cuStreamBeginCapture" + on(gpu));
  void* captured = nullptr;
  try {
    work();
  } catch (...) {
    if (call.end_capture(stream.get(), &captured) == 0 && captured != nullptr) call.destroy_graph(captured);
    throw;
  }
  check(call.end_capture(stream.get(), &captured), "cuStreamEndCapture" + on(gpu));
  graph_ = Handle(captured, Release{gpu, call.destroy_graph});
  executable_ = made(gpu, "cuGraphInstantiate", call.destroy_executable,
                     [&](void** executable) { return call.make_executable(executable, captured, 0); });
}

void Graph::launch(const Stream& stream) const {
  const int gpu = executable_.get_deleter().gpu;
  const CurrentGpu current(gpu);
  check(driver().call.launch_graph(executable_.get(), stream.get()), "cuGraphLaunch" + on(gpu));
}

void synchronize(int gpu) {
  const CurrentGpu current(gpu);
  check(driver().call.synchronize_context(), "cuCtxSynchronize" + on(gpu));
}

void fill_async(int gpu, void* memory, std::uint8_t value, std::size_t bytes, void* stream) {
  if (bytes == 0) return;
  const CurrentGpu current(gpu);
  check(driver().call.fill_async(memory, value, bytes, stream),
        "cuMemsetD8Async of " + std::to_string(bytes) + " bytes" + on(gpu));
}

void copy_async(int gpu, void* to, const void* from, std::size_t bytes, void* stream) {
  if (bytes == 0) return;
  const CurrentGpu current(gpu);
  check(driver().call.copy_async(to, from, bytes, stream),
        "cuMemcpyAsync of " + std::to_string(bytes) + " bytes" + on(gpu));
}

void* load_function(int index, const std::string& cubin, const char* name, std::string_view title,
                    std::string_view made_by) {
  const CurrentGpu current(index);
  const Functions& call = driver().call;
  const std::string of = " of kernel " + std::string(title) + on(index);
  void *module = nullptr, *function = nullptr;
  const int status = call.load_module(&module, cubin.data());
  if (std::ranges::find(kForeignImage, status) != kForeignImage.end()) {
    const int version = driver_version();
    throw Error(ErrorCode::kDevice, "the driver (CUDA " + std::to_string(version / 1000) + "." +
                                        std::to_string(version % 1000 / 10) + ") on GPU " + std::to_string(index) +
                                        " refuses kernel " + std::string(title) + " made by " + std::string(made_by) +
                                        ": " + words(call, status) +
                                        "; update the driver, or name an NVRTC no newer than it in FOVEA_NVRTC");
  }
  check(status, "cuModuleLoadData" + of);
  check(call.module_function(&function, module, name), "cuModuleGetFunction" + of);
  int fixed = 0;
  check(call.function_attribute(&fixed, kStaticSharedBytes, function), "cuFuncGetAttribute" + of);
  check(call.set_function_attribute(function, kMaxDynamicSharedBytes, gpu(index).shared_bytes_per_block - fixed),
        "cuFuncSetAttribute" + of);
  return function;
}

void launch(int gpu, void* function, std::string_view title, const Grid& grid, const void* params, void* stream) {
  const CurrentGpu current(gpu);
  std::array<void*, 1> parameters{const_cast<void*>(params)};
  const int status = driver().call.launch(function, grid.x, grid.y, grid.z, grid.threads, 1, 1, grid.shared_bytes,
                                          stream, parameters.data(), nullptr);
  if (status == 0) return;  // before any text is made: this is the hot path
  check(status, "cuLaunchKernel of " + std::string(title) + ", grid " + std::to_string(grid.x) + "×" +
                    std::to_string(grid.y) + "×" + std::to_string(grid.z) + ", " + std::to_string(grid.threads) +
                    " threads, " + std::to_string(grid.shared_bytes) + " shared bytes" + on(gpu));
}

}  // namespace fovea::cuda
