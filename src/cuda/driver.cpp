#include "cuda/driver.h"

#include <fovea/error.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <vector>

#include "cuda/library.h"

namespace fovea::cuda {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr int kOutOfMemory = 2;                                    // CUresult
constexpr std::array kForeignImage{200, 209, 218, 220, 222, 223};  // CUresult: images this driver cannot load
constexpr int kSmCount = 16, kL2Bytes = 38, kMajor = 75, kMinor = 76, kSharedPerBlock = 97;  // CUdevice_attribute
constexpr int kStaticSharedBytes = 1, kMaxDynamicSharedBytes = 8;                            // CUfunction_attribute
constexpr unsigned kNonBlocking = 1;                                                         // CUstream_flags
constexpr int kThreadLocalCapture = 1;                                                       // CUstreamCaptureMode

constexpr int kProgrammaticSerialization = 6;  // CUlaunchAttributeID
constexpr int kCapturesEarlyLaunches = 12030;  // first version that captures such launches into graphs

struct LaunchAttribute {  // CUlaunchAttribute
  int id;
  alignas(8) int value[16];
};
struct LaunchConfig {  // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const LaunchAttribute* attributes;
  unsigned attribute_count;
};

/// The driver's functions that are used here.
struct Functions {
  template <class Signature>
  using Call = LibraryFunction<Signature>;
  using Size = std::size_t;
  using U8 = unsigned char;
  using U32 = unsigned;
  using U64 = unsigned long long;

  Library library{kLibrary}, newer{kLibrary};  // functions of every driver, and those that only newer ones have
  Call<int(U32)> init{library, "cuInit"};
  Call<int(int*)> version{library, "cuDriverGetVersion"};
  Call<int(int, const char**)> error_name{library, "cuGetErrorName"};
  Call<int(int, const char**)> error_string{library, "cuGetErrorString"};
  Call<int(int*)> device_count{library, "cuDeviceGetCount"};
  Call<int(int*, int)> device{library, "cuDeviceGet"};
  Call<int(char*, int, int)> device_name{library, "cuDeviceGetName"};
  Call<int(int*, int, int)> device_attribute{library, "cuDeviceGetAttribute"};
  Call<int(Size*, int)> device_memory{library, "cuDeviceTotalMem_v2"};
  Call<int(void**, int)> retain_context{library, "cuDevicePrimaryCtxRetain"};
  Call<int(void*)> push_context{library, "cuCtxPushCurrent_v2"};
  Call<int(void**)> pop_context{library, "cuCtxPopCurrent_v2"};
  Call<int()> synchronize_context{library, "cuCtxSynchronize"};
  Call<int(void**, const void*)> load_module{library, "cuModuleLoadData"};
  Call<int(void**, void*, const char*)> module_function{library, "cuModuleGetFunction"};
  Call<int(int*, int, void*)> function_attribute{library, "cuFuncGetAttribute"};
  Call<int(void*, int, int)> set_function_attribute{library, "cuFuncSetAttribute"};
  Call<int(void*, U32, U32, U32, U32, U32, U32, U32, void*, void**, void**)> launch{library, "cuLaunchKernel"};
  Call<int(const void*, void*, void**, void**)> launch_with{newer, "cuLaunchKernelEx"};  // a LaunchConfig
  Call<int(void**, Size)> allocate{library, "cuMemAlloc_v2"};
  Call<int(void*)> free{library, "cuMemFree_v2"};
  Call<int(void*, const void*, Size, void*)> copy_async{library, "cuMemcpyAsync"};
  Call<int(void*, U8, Size, void*)> fill_async{library, "cuMemsetD8Async"};
  Call<int(void**, U32)> make_stream{library, "cuStreamCreate"};
  Call<int(void*)> synchronize_stream{library, "cuStreamSynchronize"};
  Call<int(void*)> destroy_stream{library, "cuStreamDestroy_v2"};
  Call<int(void*, int)> begin_capture{library, "cuStreamBeginCapture_v2"};
  Call<int(void*, void**)> end_capture{library, "cuStreamEndCapture"};
  Call<int(void**, void*, U64)> make_executable{library, "cuGraphInstantiateWithFlags"};
  Call<int(void*, void*)> launch_graph{library, "cuGraphLaunch"};
  Call<int(void*)> destroy_graph{library, "cuGraphDestroy"};
  Call<int(void*)> destroy_executable{library, "cuGraphExecDestroy"};
  Call<int(void**, U32)> make_event{library, "cuEventCreate"};
  Call<int(void*, void*)> record_event{library, "cuEventRecord"};
  Call<int(void*)> synchronize_event{library, "cuEventSynchronize"};
  Call<int(float*, void*, void*)> event_milliseconds{library, "cuEventElapsedTime"};
  Call<int(void*)> destroy_event{library, "cuEventDestroy_v2"};

  [[nodiscard]] int newest_cuda() const {
    int found = 0;
    if (version.address != nullptr) version(&found);
    return found;
  }
};

/// Opened on first use.
const Functions& functions() {
  static const auto& instance = *std::make_unique<const Functions>().release();  // kept: threads may call at exit
  return instance;
}

std::string words(const Functions& call, int status) {
  const char *name = nullptr, *text = nullptr;
  call.error_name(status, &name);
  call.error_string(status, &text);
  return std::string(text == nullptr ? "unknown error" : text) + " (" +
         (name == nullptr ? "error " + std::to_string(status) : name) + ")";
}

struct Driver {
  const Functions& call = functions();
  std::string why_not;  // empty: the driver works
  std::vector<Gpu> gpus;
  std::unique_ptr<std::once_flag[]> once;
  std::vector<void*> contexts;

  Driver();
  void find_gpus();
  template <class Call, class... Arguments>
  void ask(const Call& function, Arguments... arguments) {
    const int status = function(arguments...);
    if (status != 0 && why_not.empty())
      why_not = std::string("the NVIDIA driver does not start: ") + function.name + " says " + words(call, status);
  }
};

Driver::Driver() {
  if (call.library.handle == nullptr) {
    why_not = std::string("no NVIDIA driver here: ") + kLibrary + " cannot be opened";
    return;
  }
  if (!call.library.missing.empty()) {
    why_not = "the NVIDIA driver is too old: it has no " + call.library.missing + "; update it";
    return;
  }
  ask(call.init, 0U);
  if (why_not.empty()) find_gpus();
}

void Driver::find_gpus() {
  int count = 0;
  ask(call.device_count, &count);
  for (int i = 0; i < count; ++i) {
    int device = 0;
    ask(call.device, &device, i);
    const auto attribute = [&](int which) {
      int value = 0;
      ask(call.device_attribute, &value, which, device);
      return value;
    };
    std::array<char, 256> name{};
    std::size_t memory = 0;
    ask(call.device_name, name.data(), static_cast<int>(name.size()), device);
    ask(call.device_memory, &memory, device);
    gpus.push_back({.name = name.data(),
                    .compute_capability = attribute(kMajor) * 10 + attribute(kMinor),
                    .sm_count = attribute(kSmCount),
                    .memory_bytes = static_cast<std::int64_t>(memory),
                    .l2_bytes = attribute(kL2Bytes),
                    .shared_bytes_per_block = attribute(kSharedPerBlock)});
  }
  if (!why_not.empty()) gpus.clear();
  if (gpus.empty() && why_not.empty()) why_not = "the NVIDIA driver sees no GPU";
  once = std::make_unique<std::once_flag[]>(gpus.size());
  contexts.resize(gpus.size());
}

/// Made on first use and only read afterwards, except for the contexts, each behind its once_flag.
Driver& driver() {
  static auto& instance = *std::make_unique<Driver>().release();  // kept: threads may call at exit
  return instance;
}

/// The driver; throws Error where it does not work or has no such GPU.
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

template <class Call, class... Arguments>
void run(int gpu, Call Functions::*function, Arguments... arguments) {
  const CurrentGpu current(gpu);
  const Call& call = driver().call.*function;
  if (const int status = call(arguments...); status != 0) check(status, call.name, gpu);
}

/// Makes an object of the driver, together with how to destroy it.
template <class Make, class Destroy, class... Arguments>
Handle made(int gpu, Make Functions::*make, Destroy Functions::*destroy, Arguments... arguments) {
  void* handle = nullptr;
  run(gpu, make, &handle, arguments...);
  return {handle, Release{gpu, (driver().call.*destroy).address}};
}

int gpu_of(const Handle& handle) { return handle.get_deleter().gpu; }

}  // namespace

const std::string& why_no_driver() { return driver().why_not; }
int driver_version() {
  static const int version = functions().newest_cuda();
  return version;
}
int gpu_count() { return static_cast<int>(driver().gpus.size()); }
const Gpu& gpu(int index) { return driver_with(index).gpus[static_cast<std::size_t>(index)]; }

void check(int status, const std::string& what, int gpu) {
  if (status == 0) return;
  throw Error(status == kOutOfMemory ? ErrorCode::kOutOfMemory : ErrorCode::kDevice,
              what + " failed on cuda:" + std::to_string(gpu) + ": the driver says " + words(driver().call, status));
}

CurrentGpu::CurrentGpu(int index) {
  Driver& found = driver_with(index);
  const auto i = static_cast<std::size_t>(index);
  std::call_once(found.once[i], [&] {
    int device = 0;
    check(found.call.device(&device, index), found.call.device.name, index);
    check(found.call.retain_context(&found.contexts[i], device), found.call.retain_context.name, index);
  });
  check(found.call.push_context(found.contexts[i]), found.call.push_context.name, index);
}

CurrentGpu::~CurrentGpu() {
  void* popped = nullptr;
  driver().call.pop_context(&popped);
}

void Release::operator()(void* handle) const {
  try {
    const CurrentGpu current(gpu);
    function(handle);
  } catch (...) {  // a GPU that has failed has nothing to take back
  }
}

DeviceMemory::DeviceMemory(int gpu, std::size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  const CurrentGpu current(gpu);
  const Functions& call = driver().call;
  void* memory = nullptr;
  check(call.allocate(&memory, bytes), "cuMemAlloc of " + std::to_string(bytes) + " bytes", gpu);
  memory_ = Handle(memory, Release{gpu, call.free.address});
}

Stream::Stream(int gpu) : stream_(made(gpu, &Functions::make_stream, &Functions::destroy_stream, kNonBlocking)) {}
void Stream::synchronize() const { run(gpu_of(stream_), &Functions::synchronize_stream, get()); }

Event::Event(int gpu) : event_(made(gpu, &Functions::make_event, &Functions::destroy_event, 0U)) {}
void Event::record(void* stream) const { run(gpu_of(event_), &Functions::record_event, event_.get(), stream); }
void Event::synchronize() const { run(gpu_of(event_), &Functions::synchronize_event, event_.get()); }

double Event::seconds_since(const Event& start) const {
  float milliseconds = 0;
  run(gpu_of(event_), &Functions::event_milliseconds, &milliseconds, start.event_.get(), event_.get());
  return static_cast<double>(milliseconds) * 1e-3;
}

Graph::Graph(int gpu, const Stream& stream, const std::function<void()>& work) {
  run(gpu, &Functions::begin_capture, stream.get(), kThreadLocalCapture);
  std::exception_ptr fault;
  try {
    work();
  } catch (...) {
    fault = std::current_exception();  // the capture must end all the same
  }
  void* captured = nullptr;
  const int status = driver().call.end_capture(stream.get(), &captured);
  if (captured != nullptr) graph_ = Handle(captured, Release{gpu, driver().call.destroy_graph.address});
  if (fault != nullptr) std::rethrow_exception(fault);
  check(status, driver().call.end_capture.name, gpu);
  executable_ = made(gpu, &Functions::make_executable, &Functions::destroy_executable, captured, 0ULL);
}

void Graph::launch(const Stream& stream) const {
  run(gpu_of(executable_), &Functions::launch_graph, executable_.get(), stream.get());
}

void synchronize(int gpu) { run(gpu, &Functions::synchronize_context); }

void fill_async(int gpu, void* memory, std::uint8_t value, std::size_t bytes, void* stream) {
  if (bytes != 0) run(gpu, &Functions::fill_async, memory, value, bytes, stream);
}

void copy_async(int gpu, void* to, const void* from, std::size_t bytes, void* stream) {
  if (bytes != 0) run(gpu, &Functions::copy_async, to, from, bytes, stream);
}

void* load_function(int gpu, const std::string& cubin, const char* name, std::string_view title,
                    std::string_view made_by) {
  const CurrentGpu current(gpu);
  const Functions& call = driver().call;
  const std::string of = " of kernel " + std::string(title);
  void *module = nullptr, *function = nullptr;
  const int status = call.load_module(&module, cubin.data());
  if (std::ranges::find(kForeignImage, status) != kForeignImage.end()) {
    const int version = driver_version();
    throw RefusedKernel(ErrorCode::kDevice,
                        "the driver (CUDA " + std::to_string(version / 1000) + "." +
                            std::to_string(version % 1000 / 10) + ") of cuda:" + std::to_string(gpu) +
                            " refuses kernel " + std::string(title) + " made by " + std::string(made_by) + ": " +
                            words(call, status) +
                            "; update the driver, or use an NVRTC no newer than it (FOVEA_NVRTC), for packs too");
  }
  check(status, call.load_module.name + of, gpu);
  check(call.module_function(&function, module, name), call.module_function.name + of, gpu);
  int fixed = 0;
  check(call.function_attribute(&fixed, kStaticSharedBytes, function), call.function_attribute.name + of, gpu);
  check(call.set_function_attribute(function, kMaxDynamicSharedBytes, cuda::gpu(gpu).shared_bytes_per_block - fixed),
        call.set_function_attribute.name + of, gpu);
  return function;
}

void launch(int gpu, void* function, std::string_view title, const Grid& grid, const void* params, void* stream) {
  const CurrentGpu current(gpu);
  std::array<void*, 1> parameters{const_cast<void*>(params)};
  const LaunchAttribute early{.id = kProgrammaticSerialization, .value = {1}};
  const LaunchConfig config{
      {grid.x, grid.y, grid.z}, {grid.threads, grid.threads_y, 1}, grid.shared_bytes, stream, &early, 1};
  const bool ahead = grid.early && driver_version() >= kCapturesEarlyLaunches;
  const Functions& call = driver().call;
  const int status = ahead ? call.launch_with(&config, function, parameters.data(), nullptr)
                           : call.launch(function, grid.x, grid.y, grid.z, grid.threads, grid.threads_y, 1U,
                                         grid.shared_bytes, stream, parameters.data(), nullptr);
  if (status == 0) return;  // without making the text below
  const auto text = [](unsigned number) { return std::to_string(number); };
  check(status,
        std::string(ahead ? call.launch_with.name : call.launch.name) + " of " + std::string(title) + " with " +
            text(grid.x) + " × " + text(grid.y) + " × " + text(grid.z) + " blocks of " +
            text(grid.threads * grid.threads_y) + " threads and " + text(grid.shared_bytes) + " dynamic shared bytes",
        gpu);
}

}  // namespace fovea::cuda
