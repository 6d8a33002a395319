#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu/flash/call.h"
#include "math/float16.h"
#include "math/philox.h"

// The vector vocabulary, in GCC's vector extensions: arithmetic and comparisons are the operators, and only what they
// lack is named here.  One text for every instruction set; FOVEA_ISA is the namespace of the one being compiled.
#define FOVEA_INLINE [[gnu::always_inline]] inline
#ifdef __clang__
#define FOVEA_UNROLL _Pragma("unroll")
#else
#define FOVEA_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fovea::cpu::FOVEA_ISA {

#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
inline constexpr int kAccumulators = 24;  // of 32 registers; the rest hold operands
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
inline constexpr int kAccumulators = 12;  // of 16
#else
inline constexpr int kWidth = 4;
inline constexpr int kAccumulators = 12;
#endif

using V = float __attribute__((vector_size(kWidth * 4)));
using VI = std::int32_t __attribute__((vector_size(kWidth * 4)));
using VU = std::uint32_t __attribute__((vector_size(kWidth * 4)));
using LooseV __attribute__((aligned(4), may_alias)) = V;

inline constexpr float kInfinity = __builtin_inff();
inline constexpr float kLog2E = 1.44269504088896341F;
inline constexpr float kLn2 = 0.693147180559945309F;

FOVEA_INLINE V load(const float* p) { return *reinterpret_cast<const LooseV*>(p); }
FOVEA_INLINE void store(float* p, V x) { *reinterpret_cast<LooseV*>(p) = x; }
FOVEA_INLINE VI as_int(V x) { return __builtin_bit_cast(VI, x); }
FOVEA_INLINE VU as_unsigned(V x) { return __builtin_bit_cast(VU, x); }
FOVEA_INLINE V as_float(VI x) { return __builtin_bit_cast(V, x); }
FOVEA_INLINE V as_float(VU x) { return __builtin_bit_cast(V, x); }
FOVEA_INLINE V to_float(VI x) { return __builtin_convertvector(x, V); }

FOVEA_INLINE V splat(float x) {
#if defined(__AVX512F__)
  return V(_mm512_set1_ps(x));
#elif defined(__AVX2__)
  return V(_mm256_set1_ps(x));
#else
  return V{x, x, x, x};
#endif
}
FOVEA_INLINE VI splat(std::int32_t x) { return VI{} + x; }
FOVEA_INLINE VU splat(std::uint32_t x) { return VU{} + x; }

/// The larger; a NaN in `a` is passed over, a NaN in `b` stays.
FOVEA_INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  return V(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(__AVX2__)
  return V(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

FOVEA_INLINE V absolute(V x) { return as_float(as_unsigned(x) & 0x7fffffffU); }

/// High and low words of a 32 × 32 bit product, lane by lane.
struct Wide {
  VU high, low;
};
FOVEA_INLINE Wide multiply_wide(VU a, VU b) {
#if defined(__AVX512F__)
  const auto even = _mm512_mul_epu32(__m512i(a), __m512i(b));
  const auto odd = _mm512_mul_epu32(_mm512_srli_epi64(__m512i(a), 32), _mm512_srli_epi64(__m512i(b), 32));
  return {VU(_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd)),
          VU(_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)))};
#elif defined(__AVX2__)
  const auto even = _mm256_mul_epu32(__m256i(a), __m256i(b));
  const auto odd = _mm256_mul_epu32(_mm256_srli_epi64(__m256i(a), 32), _mm256_srli_epi64(__m256i(b), 32));
  return {VU(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA)),
          VU(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA))};
#else
  Wide r{};
  for (int i = 0; i < kWidth; ++i) {
    const std::uint64_t p = std::uint64_t{a[i]} * b[i];
    r.high[i] = static_cast<std::uint32_t>(p >> 32);
    r.low[i] = static_cast<std::uint32_t>(p);
  }
  return r;
#endif
}

/// 2^x for x below 127 as 2^n · p(f) with n = round(x); p interpolates 2^f on [−1/2, 1/2] at Chebyshev nodes to 5e-9,
/// so that what remains is rounding (below 1.5 units in the last place).  Below −126 it is exactly 0, and NaN stays
/// NaN.
FOVEA_INLINE V exp2(V x) {
  const V magic = splat(12582912.0F);  // 1.5·2^23: adding it rounds to an integer, whose bits are then the low ones
  const V shifted = x + magic;
  const V f = x - (shifted - magic);
  V p = splat(1.5453162945120691e-4F);
  p = p * f + splat(1.3390863364671234e-3F);
  p = p * f + splat(9.6180825572778524e-3F);
  p = p * f + splat(5.5503571142190782e-2F);
  p = p * f + splat(2.4022650760568126e-1F);
  p = p * f + splat(6.9314718802622877e-1F);
  p = p * f + splat(1.0F);
  const V power = as_float((as_unsigned(shifted) << 23) + 0x3f800000U);
  return x < splat(-126.0F) ? V{} : p * power;
}

/// tanh(x) with relative error below 3e-7: an odd polynomial near 0, 1 − 2 / (e^2x + 1) elsewhere (Cephes' split).
FOVEA_INLINE V tanh(V x) {
  const V a = absolute(x), z = x * x;
  V p = splat(-5.70498872745e-3F);
  p = p * z + splat(2.06390887954e-2F);
  p = p * z + splat(-5.37397155531e-2F);
  p = p * z + splat(1.33314422036e-1F);
  p = p * z + splat(-3.33332819422e-1F);
  const V near = p * z * x + x;
  const V e = exp2(a * splat(-2.0F * kLog2E));  // e^−2|x|
  const V far = (splat(1.0F) - e) / (splat(1.0F) + e);
  const V signed_far = as_float(as_unsigned(far) | (as_unsigned(x) & 0x80000000U));
  return a < splat(0.625F) ? near : signed_far;
}

FOVEA_INLINE float sum(V x) {
  float total = 0.0F;
  for (int i = 0; i < kWidth; ++i) total += x[i];
  return total;
}

// ---- storage types

FOVEA_INLINE i64 bytes(Element type) { return type == Element::kFloat32 ? 4 : 2; }

FOVEA_INLINE float widen(const char* p, Element type) {
  if (type == Element::kFloat32) return *reinterpret_cast<const float*>(p);
  const auto x = *reinterpret_cast<const std::uint16_t*>(p);
  return type == Element::kBFloat16 ? math::float_of_bf16(x) : math::float_of_half(x);
}

FOVEA_INLINE void narrow(char* p, Element type, float x) {
  if (type == Element::kFloat32) {
    *reinterpret_cast<float*>(p) = x;
  } else {
    *reinterpret_cast<std::uint16_t*>(p) = type == Element::kBFloat16 ? math::bf16_of_float(x) : math::half_of_float(x);
  }
}

FOVEA_INLINE V widen_vector(const char* p, Element type) {
  if (type == Element::kFloat32) return load(reinterpret_cast<const float*>(p));
  using Short = std::uint16_t __attribute__((vector_size(kWidth * 2)));
  using LooseShort __attribute__((aligned(2), may_alias)) = Short;
  const Short x = *reinterpret_cast<const LooseShort*>(p);
  if (type == Element::kBFloat16) return as_float(__builtin_convertvector(x, VU) << 16);
#if defined(__AVX512F__)
  return V(_mm512_cvtph_ps(__m256i(x)));
#elif defined(__F16C__)
  return V(_mm256_cvtph_ps(__m128i(x)));
#else
  V r{};
  for (int i = 0; i < kWidth; ++i) r[i] = math::float_of_half(x[i]);
  return r;
#endif
}

/// Copies n elements to floats and pads with zeros up to `padded`.  Tells whether all of them are finite.
inline bool widen_row(float* to, const char* from, Element type, i64 n, i64 padded) {
  V taint{};  // 0·x is NaN where x is not finite
  i64 i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const V x = widen_vector(from + i * bytes(type), type);
    store(to + i, x);
    taint += x * 0.0F;
  }
  float rest = sum(taint);
  for (; i < n; ++i) rest += (to[i] = widen(from + i * bytes(type), type)) * 0.0F;
  for (; i < padded; ++i) to[i] = 0.0F;
  return rest == 0.0F;
}

inline void narrow_row(char* to, const float* from, Element type, i64 n) {
  i64 i = 0;
  if (type == Element::kFloat32) {
    for (; i + kWidth <= n; i += kWidth) store(reinterpret_cast<float*>(to) + i, load(from + i));
  }
  for (; i < n; ++i) narrow(to + i * bytes(type), type, from[i]);
}

}  // namespace fovea::cpu::FOVEA_ISA
