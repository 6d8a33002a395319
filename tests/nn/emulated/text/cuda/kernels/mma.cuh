#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/spec.h"
#include "math/float16.h"

// In place of src/cuda/kernels/mma.cuh: what the layers' kernels use of a GPU, on the CPU.  gpu.cpp runs the threads.
// NOLINTBEGIN(bugprone-reserved-identifier): CUDA's words
#define FOVEA_DEVICE inline
#define __shared__ static
#define threadIdx (::emulated::thread_index())
#define blockIdx (::emulated::block_index())
#define __shfl_xor_sync(mask, x, step) ::emulated::of_lane(x, step)
#define __syncthreads() ::emulated::await()
#define __syncwarp() ::emulated::await()
// NOLINTEND(bugprone-reserved-identifier)

namespace emulated {

struct Index {
  unsigned x, y;
};
Index thread_index();
Index block_index();

/// Lets all other threads of the block come to their next wait.
void await();

/// What the lane `step` away gives to the same call.
float of_lane(float x, int step);
int of_lane(int x, int step);

}  // namespace emulated

namespace fovea::cuda {

using math::i64;
using math::u16;
using math::u32;
using math::u64;
using std::isinf;
using std::max;

inline constexpr int kWarp = 32;
inline constexpr u32 kAllLanes = ~u32{0};

inline int lane_id() { return static_cast<int>(emulated::thread_index().x) % kWarp; }
inline int warp_id() { return static_cast<int>(emulated::thread_index().x) / kWarp; }
inline float infinity() { return HUGE_VALF; }

// NOLINTBEGIN(clang-analyzer-core.NullDereference): kernels read and write what they were given
template <Type kType>
float read(const char* p) {
  if constexpr (kType == Type::kFloat32) return *reinterpret_cast<const float*>(p);
  const u16 bits = *reinterpret_cast<const u16*>(p);
  return kType == Type::kFloat16 ? math::float_of_half(bits) : math::float_of_bf16(bits);
}

template <Type kType>
void write(char* p, float x) {
  if constexpr (kType == Type::kFloat32) {
    *reinterpret_cast<float*>(p) = x;
  } else {
    *reinterpret_cast<u16*>(p) = kType == Type::kFloat16 ? math::half_of_float(x) : math::bf16_of_float(x);
  }
}
// NOLINTEND(clang-analyzer-core.NullDereference)

}  // namespace fovea::cuda
