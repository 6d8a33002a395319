#pragma once

#include "cuda/params.h"
#include "cuda/spec.h"

// GPU instructions that C++ has no words for.
#define FOVEA_DEVICE __device__ __forceinline__

namespace fovea::cuda {

using Band = math::BandOf<int>;
using Interval = math::IntervalOf<int>;
using math::TileState;
using u16 = unsigned short;

inline constexpr float kLog2E = 1.44269504088896341F;
inline constexpr float kLn2 = 0.693147180559945309F;
inline constexpr int kWarp = 32;
inline constexpr u32 kAllLanes = 0xffffffffU;

FOVEA_DEVICE float infinity() { return __int_as_float(0x7f800000); }
FOVEA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }
FOVEA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / kWarp); }

/// 2^x; below −126 it is 0.
FOVEA_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FOVEA_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FOVEA_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh(x) with relative error below 3e-7: an odd polynomial near 0, 1 − 2 / (e^2x + 1) elsewhere (Cephes' split).
FOVEA_DEVICE float tanh(float x) {
  const float a = fabsf(x), z = x * x;
  float p = -5.70498872745e-3F;
  p = p * z + 2.06390887954e-2F;
  p = p * z - 5.37397155531e-2F;
  p = p * z + 1.33314422036e-1F;
  p = p * z - 3.33332819422e-1F;
  const float near = p * z * x + x;
  const float far = 1.0F - 2.0F * reciprocal(exp2(2.0F * kLog2E * a) + 1.0F);
  return a < 0.625F ? near : copysignf(far, x);
}

/// Likewise for |x| < 1: of relative error 6e-8 (Remez) and what rounding adds.
FOVEA_DEVICE float tanh_below_1(float x) {
  const float z = x * x;
  float p = 1.058264807e-3F;
  p = p * z - 6.25933982e-3F;
  p = p * z + 2.035975993e-2F;
  p = p * z - 5.34987079e-2F;
  p = p * z + 1.332640888e-1F;
  p = p * z - 3.333298678e-1F;
  return p * z * x + x;
}

/// Likewise for any x, of absolute error 2e-7: enough beside what rounds sums of many products.
FOVEA_DEVICE float tanh_beside_16_bits(float x) { return 1.0F - 2.0F * reciprocal(exp2(2.0F * kLog2E * x) + 1.0F); }

/// Over the four lanes that share the rows of an accumulator.  The maximum ignores NaN.
FOVEA_DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
FOVEA_DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

/// Lane t of a quad gets word t of each of its lanes, in their order.
FOVEA_DEVICE void transpose_quad(u32 (&w)[4]) {
  const u32 lane = threadIdx.x;
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool high = (lane & bit) != 0;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      u32 &low_word = w[bit == 1 ? 2 * x : x], &high_word = w[bit == 1 ? 2 * x + 1 : x + 2];
      const u32 other = __shfl_xor_sync(kAllLanes, high ? low_word : high_word, bit);
      (high ? low_word : high_word) = other;
    }
  }
}

/// 16 bytes that this multiprocessor reads once.
FOVEA_DEVICE uint4 read_once(const void* from) {
  uint4 x;
  asm("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
      : "l"(from));
  return x;
}

/// Programmatic dependent launch (`Template::early`): a kernel launched early waits for the one ahead to end, before
/// any thread reads what may be its work, which lets it begin once all of its own blocks have said so.  Who says so
/// has waited before, or was not launched early: what ran before it has ended then.
FOVEA_DEVICE void await_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
FOVEA_DEVICE void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- shared memory, by address in its own space

FOVEA_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

/// The same number, opaque to the compiler, which then computes with it anew rather than keep results in registers.
template <class T>
FOVEA_DEVICE T fresh(T x) {
  asm volatile("" : "+r"(x));
  return x;
}
FOVEA_DEVICE float fresh(float x) { return __uint_as_float(fresh(__float_as_uint(x))); }

/// Tells the compiler that all lanes of a whole warp have the same number, which then takes no register of each lane.
FOVEA_DEVICE u32 uniform(u32 x) {
#if __CUDA_ARCH__ >= 800
  asm("redux.sync.or.b32 %0, %1, 0xffffffff;" : "=r"(x) : "r"(x));
#endif
  return x;
}

/// The same of a condition: a branch on it does not diverge.
FOVEA_DEVICE bool uniform(bool x) { return __any_sync(kAllLanes, x); }

/// The bits [begin, end) that lie within [0, 32).
FOVEA_DEVICE u32 bits_between(int begin, int end) {
  u32 bits;
  begin = math::larger(begin, 0);
  asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(bits) : "r"(begin), "r"(math::larger(end - begin, 0)));
  return bits;
}

FOVEA_DEVICE u32 load_shared(u32 address) {
  u32 x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
  return x;
}
FOVEA_DEVICE void store_shared(u32 address, u32 x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
FOVEA_DEVICE float2 load_shared_8(u32 address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
FOVEA_DEVICE void store_shared_8(u32 address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
FOVEA_DEVICE uint4 load_shared_16(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
FOVEA_DEVICE void store_shared_16(u32 address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

/// Four 8 × 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
FOVEA_DEVICE void load_matrices(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
FOVEA_DEVICE void load_matrices_transposed(u32 (&x)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// ---- copies from global to shared memory

/// The first `bytes` of 16 from any even address; the others are 0.
FOVEA_DEVICE uint4 gather_16(const char* from, int bytes) {
  u32 words[4];
  for (int w = 0; w < 4; ++w) {
    const u32 low = 4 * w < bytes ? *reinterpret_cast<const u16*>(from + 4 * w) : 0;
    const u32 high = 4 * w + 2 < bytes ? *reinterpret_cast<const u16*>(from + 4 * w + 2) : 0;
    words[w] = low | high << 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

/// Writes the first bytes of 16 to any even address.
FOVEA_DEVICE void scatter_16(char* to, uint4 x, int bytes) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int w = 0; w < 8; ++w) {
    if (2 * w < bytes) *reinterpret_cast<u16*>(to + 2 * w) = static_cast<u16>(words[w / 2] >> (w % 2 * 16));
  }
}

/// A piece of 16 bytes of a row that ends after `bytes` of it.
FOVEA_DEVICE uint4 read_piece(const char* from, int bytes, bool aligned) {
  return aligned && bytes >= 16 ? *reinterpret_cast<const uint4*>(from) : gather_16(from, bytes);
}

FOVEA_DEVICE void write_piece(char* to, uint4 x, int bytes, bool aligned) {
  if (aligned && bytes >= 16) {
    *reinterpret_cast<uint4*>(to) = x;
  } else {
    scatter_16(to, x, bytes);
  }
}

template <bool kAsync>
FOVEA_DEVICE void close_copies() {
  if constexpr (kAsync) asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most kOpen groups of this thread's copies are in flight.
template <bool kAsync, int kOpen>
FOVEA_DEVICE void await_copies() {
  if constexpr (kAsync) asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

}  // namespace fovea::cuda
