#pragma once

#include <fovea/error.h>
#include <fovea/export.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

// The NVIDIA driver, opened at run time: the library builds and links without CUDA.  Streams, functions and addresses
// are the driver's own (CUstream, CUfunction, CUdeviceptr) as void*.  A failed call throws Error with the call, its
// object and the driver's message.  What is exported is for the layers' library (src/nn) alone.
namespace fovea::cuda {

/// Why no GPU can be used here; empty where one can.
[[nodiscard]] FOVEA_API const std::string& why_no_driver();

/// The newest CUDA version the driver supports, 13000 for 13.0; 0 where there is no driver.  Works without a GPU and
/// does not initialise the driver, after which a process could not fork.
[[nodiscard]] FOVEA_API int driver_version();

struct Gpu {
  std::string name;
  int compute_capability = 0;  ///< 90 for sm_90
  int sm_count = 0;
  std::int64_t memory_bytes = 0;
  std::int64_t l2_bytes = 0;
  int shared_bytes_per_block = 0;  ///< the most that a kernel may ask for
};

/// 0 where there is no driver.
[[nodiscard]] int gpu_count();

/// Throws Error(kDevice) where there is no driver, Error(kInvalidArgument) where there is no such GPU.
[[nodiscard]] FOVEA_API const Gpu& gpu(int index);

/// Throws Error with the driver's message unless a status of it (CUresult) is 0.  `what`: its function, and the object
/// where that helps.
FOVEA_API void check(int status, const std::string& what, int gpu);

/// Makes a GPU's primary context, which the CUDA runtime and PyTorch use too, this thread's current one; its end
/// restores the one before.
class FOVEA_API CurrentGpu {
 public:
  explicit CurrentGpu(int index);
  ~CurrentGpu();
  CurrentGpu(const CurrentGpu&) = delete;
  CurrentGpu& operator=(const CurrentGpu&) = delete;
};

/// Releases a handle of the driver on its GPU.
struct FOVEA_API Release {
  int gpu = 0;
  int (*function)(void*) = nullptr;
  void operator()(void* handle) const;
};
using Handle = std::unique_ptr<void, Release>;

/// Device memory.  Its end may come while kernels still use it: the driver waits for them before it frees.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(int gpu, std::size_t bytes);  ///< 0 bytes: null

  [[nodiscard]] void* data() const { return memory_.get(); }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  Handle memory_;
  std::size_t bytes_ = 0;
};

/// A stream that does not synchronise with the default one.
class Stream {
 public:
  explicit Stream(int gpu);
  [[nodiscard]] void* get() const { return stream_.get(); }
  void synchronize() const;

 private:
  Handle stream_;
};

class Event {
 public:
  explicit Event(int gpu);
  void record(void* stream) const;
  void synchronize() const;
  [[nodiscard]] double seconds_since(const Event& start) const;  ///< both recorded and over

 private:
  Handle event_;
};

/// A CUDA graph of what `work` puts into the stream.
class Graph {
 public:
  Graph(int gpu, const Stream& stream, const std::function<void()>& work);
  void launch(const Stream& stream) const;

 private:
  Handle graph_, executable_;
};

/// Waits for everything on a GPU; throws where a kernel has failed.
FOVEA_API void synchronize(int gpu);

// Into a stream of the GPU; both may be captured.
FOVEA_API void fill_async(int gpu, void* memory, std::uint8_t value, std::size_t bytes, void* stream);
FOVEA_API void copy_async(int gpu, void* to, const void* from, std::size_t bytes, void* stream);

/// The driver cannot load a kernel, mostly because it is older than the compiler of the kernel.
struct RefusedKernel : Error {
  using Error::Error;
};

/// The kernel `name` of a cubin, loaded until the process ends and allowed all shared memory of a block.  `title` and
/// `made_by` ("NVRTC 13.0") are for the sentence of an error.
[[nodiscard]] void* load_function(int gpu, const std::string& cubin, const char* name, std::string_view title,
                                  std::string_view made_by);

struct Grid {
  unsigned x = 1, y = 1, z = 1;
  unsigned threads = 128, threads_y = 1;
  unsigned shared_bytes = 0;  ///< dynamic
  bool early = false;         ///< programmatic dependent launch (sm_90): the kernel itself waits for the one before
};

/// `params` is the kernel's one parameter, copied before this returns.
FOVEA_API void launch(int gpu, void* function, std::string_view title, const Grid& grid, const void* params,
                      void* stream);

}  // namespace fovea::cuda
