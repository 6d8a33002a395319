#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "cuda/params.h"
#include "cuda/spec.h"
#include "tests/ladder/emulator.h"

// In the place of src/cuda/kernels/device.cuh: the words of a GPU, spoken by a CPU.  With products by shuffles and
// without asynchronous copies nothing else of the device text knows of PTX.
#define FOVEA_DEVICE inline
#define __device__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))

namespace fovea::cuda {

using Band = math::BandOf<int>;
using Interval = math::IntervalOf<int>;
using math::TileState;
using u16 = unsigned short;
using tests::blockIdx, tests::gridDim, tests::threadIdx;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

inline constexpr float kLog2E = 1.44269504088896341F;
inline constexpr float kLn2 = 0.693147180559945309F;
inline constexpr int kWarp = 32;
inline constexpr u32 kAllLanes = 0xffffffffU;

inline float infinity() { return std::numeric_limits<float>::infinity(); }
inline int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
inline int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }
inline float exp2(float x) { return x < -126.0F ? 0.0F : std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float __uint_as_float(u32 x) { return std::bit_cast<float>(x); }
inline u32 __float_as_uint(float x) { return std::bit_cast<u32>(x); }

inline void __syncthreads() { tests::Emulator::here().meet_block(); }
inline void __syncwarp() { tests::Emulator::here().meet_warp(); }
template <class T>
T __shfl_sync(u32 /*lanes*/, T x, int lane) {
  return std::bit_cast<T>(tests::Emulator::here().exchange(std::bit_cast<u32>(x), lane % kWarp));
}
template <class T>
T __shfl_xor_sync(u32 lanes, T x, int lane) {
  return __shfl_sync(lanes, x, lane_id() ^ lane);
}
inline void atomicAdd(float* to, float x) { *to += x; }

inline float quad_max(float x) {
  x = std::fmax(x, __shfl_xor_sync(kAllLanes, x, 1));
  return std::fmax(x, __shfl_xor_sync(kAllLanes, x, 2));
}
inline float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// Shared memory's addresses count from the block's own.
inline u32 shared_address(const void* p) { return tests::Emulator::here().address_of(p); }
template <class T>
T& shared_at(u32 address) {
  return *static_cast<T*>(tests::Emulator::here().shared(address, sizeof(T)));
}
template <class T>
T fresh(T x) {
  return x;
}
inline u32 load_shared(u32 address) { return shared_at<u32>(address); }
inline void store_shared(u32 address, u32 x) { shared_at<u32>(address) = x; }
inline uint4 load_shared_16(u32 address) { return shared_at<uint4>(address); }
inline void store_shared_16(u32 address, uint4 x) { shared_at<uint4>(address) = x; }

/// Lane l receives of matrix m the words, or numbers, that ldmatrix gives it.
inline void load_matrices(u32 (&x)[4], u32 address) {
  for (int m = 0; m < 4; ++m) {
    const u32 row = tests::Emulator::here().exchange(address, 8 * m + lane_id() / 4);
    x[m] = load_shared(row + static_cast<u32>(lane_id() % 4 * 4));
  }
}
inline void load_matrices_transposed(u32 (&x)[4], u32 address) {
  for (int m = 0; m < 4; ++m) {
    x[m] = 0;
    for (int half = 0; half < 2; ++half) {
      const u32 row = tests::Emulator::here().exchange(address, 8 * m + lane_id() % 4 * 2 + half);
      x[m] |= u32{shared_at<u16>(row + static_cast<u32>(lane_id() / 4 * 2))} << 16 * half;
    }
  }
}

/// Up to 16 bytes from any even address; the others are 0.
inline uint4 gather_16(const char* from, int bytes) {
  u16 x[8] = {};
  for (int e = 0; 2 * e < bytes && e < 8; ++e) x[e] = *reinterpret_cast<const u16*>(from + 2 * e);
  return std::bit_cast<uint4>(x);
}
inline void scatter_16(char* to, uint4 x, int bytes) {
  for (int e = 0; 2 * e < bytes && e < 8; ++e)
    *reinterpret_cast<u16*>(to + 2 * e) = reinterpret_cast<const u16*>(&x)[e];
}
inline uint4 read_piece(const char* from, int bytes, bool /*aligned*/) { return gather_16(from, bytes); }
inline void write_piece(char* to, uint4 x, int bytes, bool /*aligned*/) { scatter_16(to, x, bytes); }

template <bool kAsync>
void close_copies() {}
template <bool kAsync, int kOpen>
void await_copies() {}

}  // namespace fovea::cuda
