#include "nn/cuda/memory.h"

#include <fovea/error.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "cuda/driver.h"
#include "cuda/library.h"

namespace fovea::nn {
namespace {

using cuda::check;

constexpr int kOutOfMemory = 2;                      // CUresult
constexpr int kPinned = 1, kOnDevice = 1;            // CUmemAllocationType, CUmemLocationType
constexpr int kReleaseThreshold = 4, kUsedHigh = 8;  // CUmemPool_attribute

/// CUmemPoolProps of cuda.h.
struct PoolProperties {
  int allocation_type = kPinned, handle_types = 0;
  int location_type = kOnDevice, location = 0;
  void* security = nullptr;
  std::size_t most = 0;
  unsigned char reserved[56] = {};
};

struct Functions {
  template <class Signature>
  using Call = cuda::LibraryFunction<Signature>;

  cuda::Library library{"libcuda.so.1"};
  Call<int(int*, int)> device{library, "cuDeviceGet"};
  Call<int(void**, const PoolProperties*)> make_pool{library, "cuMemPoolCreate"};
  Call<int(void*, int, void*)> set_attribute{library, "cuMemPoolSetAttribute"};
  Call<int(void*, int, void*)> attribute{library, "cuMemPoolGetAttribute"};
  Call<int(void**, std::size_t, void*, void*)> allocate{library, "cuMemAllocFromPoolAsync"};
  Call<int(void*, void*)> free{library, "cuMemFreeAsync"};
};

const Functions& call() {
  static const auto& functions = *std::make_unique<const Functions>().release();  // kept: threads may call at exit
  return functions;
}

/// Made once for each GPU, for as long as the process lives.
void* pool_of(int gpu) {
  static std::mutex mutex;
  static auto& pools = *std::make_unique<std::map<int, void*>>().release();
  const std::lock_guard lock(mutex);
  void*& pool = pools[gpu];
  if (pool != nullptr) return pool;
  if (!call().library.missing.empty()) {
    throw Error(ErrorCode::kDevice,
                "the NVIDIA driver has no " + call().library.missing + "; layers need one of CUDA 11.2 or later");
  }
  PoolProperties properties;
  check(call().device(&properties.location, gpu), call().device.name, gpu);
  void* made = nullptr;
  check(call().make_pool(&made, &properties), call().make_pool.name, gpu);
  std::uint64_t everything = ~std::uint64_t{0};
  check(call().set_attribute(made, kReleaseThreshold, &everything), call().set_attribute.name, gpu);
  return pool = made;
}

}  // namespace

std::shared_ptr<std::byte> allocate_on_gpu(int gpu, std::size_t bytes) {
  const cuda::CurrentGpu current(gpu);
  void* memory = nullptr;
  const int status = call().allocate(&memory, bytes == 0 ? 1 : bytes, pool_of(gpu), nullptr);
  if (status == kOutOfMemory) {
    throw Error(ErrorCode::kOutOfMemory, "a tensor of " + std::to_string(bytes) +
                                             " bytes could not be allocated on cuda:" + std::to_string(gpu) +
                                             "; free memory or use a smaller batch");
  }
  check(status, call().allocate.name, gpu);
  return {static_cast<std::byte*>(memory), cuda::Release{gpu, [](void* p) { return call().free(p, nullptr); }}};
}

std::size_t peak_on_gpu(int gpu, bool forget) {
  const cuda::CurrentGpu current(gpu);
  std::uint64_t peak = 0, nothing = 0;
  check(call().attribute(pool_of(gpu), kUsedHigh, &peak), call().attribute.name, gpu);
  if (forget) check(call().set_attribute(pool_of(gpu), kUsedHigh, &nothing), call().set_attribute.name, gpu);
  return peak;
}

}  // namespace fovea::nn
