#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "cpu/flash/call.h"
#include "math/philox.h"

// The vector vocabulary, in GCC's vector extensions: arithmetic and comparisons are the operators, and only what they
// lack is named here.  One text for every instruction set; FOVEA_ISA is the namespace of the one being compiled.
#define FOVEA_INLINE [[gnu::always_inline]] inline
#ifdef __clang__
#define FOVEA_UNROLL _Pragma("unroll")
#define FOVEA_UNROLL_BY_4 _Pragma("unroll 4")
#else
#define FOVEA_UNROLL _Pragma("GCC unroll 32")
#define FOVEA_UNROLL_BY_4 _Pragma("GCC unroll 4")
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

// What a product multiplies are words of 32 bits: floats, or pairs of bf16 that lie side by side along the summed
// index.
enum class Word { kFloat, kPair };
template <Word kWord>
inline constexpr i64 kPerWord = kWord == Word::kPair ? 2 : 1;
#if defined(__AVX512BF16__)
inline constexpr bool kHasPairs = true;
#else
inline constexpr bool kHasPairs = false;
#endif

using V = float __attribute__((vector_size(kWidth * 4)));
using VI = std::int32_t __attribute__((vector_size(kWidth * 4)));
using VU = std::uint32_t __attribute__((vector_size(kWidth * 4)));
using LooseV __attribute__((aligned(1), may_alias)) = V;  // the bytes of a mask begin anywhere

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

/// sum + a · b, word by word.
template <Word kWord>
FOVEA_INLINE V multiply_add(V a, V b, V sum) {
#if defined(__AVX512BF16__)
  if constexpr (kWord == Word::kPair) return V(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#endif
  return sum + a * b;
}

template <int...>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif
/// In groups of 2·kHalf lanes, the upper half of `a` and the lower one of `b` change places.
template <int kHalf, int... kLane>
FOVEA_INLINE void swap_halves(V& a, V& b, Lanes<kLane...> /*all*/) {
  const V low = __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? kWidth + kLane - kHalf : kLane)...);
  b = __builtin_shufflevector(a, b, ((kLane & kHalf) != 0 ? kWidth + kLane : kLane + kHalf)...);
  a = low;
}
/// The lanes of the rows of a square change places: x[i][j] becomes x[j][i].
template <int kHalf = kWidth / 2>
FOVEA_INLINE void transpose(V (&x)[kWidth]) {
  FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) {
    if ((i & kHalf) == 0) swap_halves<kHalf>(x[i], x[i + kHalf], AllLanes{});
  }
  if constexpr (kHalf > 1) transpose<kHalf / 2>(x);
}

template <int kHalf, int... kLane>
FOVEA_INLINE V flip_halves(V x, Lanes<kLane...> /*all*/) {
  return __builtin_shufflevector(x, x, (kLane ^ kHalf)...);
}
/// Every lane becomes the sum of the kCount lanes of its group.
template <int kCount>
FOVEA_INLINE V sum_of_group(V x) {
  if constexpr (kCount == 1) {
    return x;
  } else {
    return sum_of_group<kCount / 2>(x + flip_halves<kCount / 2>(x, AllLanes{}));
  }
}

/// The lanes in as many groups as there are vectors, a power of two, each of them the sum of its vector's lanes.
template <int kGroup = kWidth, int kCount>
FOVEA_INLINE V sums_in_groups(V (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return sum_of_group<kGroup>(x[0]);
  } else {
    V halves[kCount / 2];
    FOVEA_UNROLL for (int i = 0; i < kCount / 2; ++i) {
      swap_halves<kGroup / 2>(x[i], x[i + kCount / 2], AllLanes{});
      halves[i] = x[i] + x[i + kCount / 2];
    }
    return sums_in_groups<kGroup / 2>(halves);
  }
}

/// Of what a comparison gave.
FOVEA_INLINE bool any(VI x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(x), __m512i(x)) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(__m256i(x), __m256i(x)) == 0;
#else
  int all = 0;
  for (int i = 0; i < kWidth; ++i) all |= x[i];
  return all != 0;
#endif
}

FOVEA_INLINE V absolute(V x) { return as_float(as_unsigned(x) & 0x7fffffffU); }

/// Pairs of lanes as one, the first of them the low half.
using VQ = std::uint64_t __attribute__((vector_size(kWidth * 4)));

/// Products of the low halves.
FOVEA_INLINE VQ multiply_low_halves(VQ a, VQ b) {
#if defined(__AVX512F__)
  return VQ(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return VQ(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#else
  return (a & 0xffffffffU) * (b & 0xffffffffU);
#endif
}

/// The keys of a dropout stream's rounds, for the first lanes of pairs and for the second ones.
struct DropoutKeys {
  VQ first[math::kDropoutRounds], second[math::kDropoutRounds];
};
FOVEA_INLINE DropoutKeys dropout_keys(VU key) {
  DropoutKeys keys;
  for (int round = 0; round < math::kDropoutRounds; ++round, key += math::kPhiloxW0) {
    keys.first[round] = VQ(key);
    keys.second[round] = VQ(key) >> 32;
  }
  return keys;
}

/// math::draws_of_patch in each lane.  High halves hold what is left of other numbers: products do not read them.
struct DropoutWords {
  VU words[2];
};
FOVEA_INLINE DropoutWords dropout_words(VU x0, VU x1, const DropoutKeys& keys) {
  const VQ multiplier = VQ{} + math::kPhilox2x32M;
  VQ a = VQ(x0), b = VQ(x0) >> 32, c = VQ(x1), d = VQ(x1) >> 32;
  FOVEA_UNROLL for (int round = 0; round < math::kDropoutRounds; ++round) {
    const VQ p = multiply_low_halves(a, multiplier), q = multiply_low_halves(b, multiplier);
    a = (p >> 32) ^ keys.first[round] ^ c;
    b = (q >> 32) ^ keys.second[round] ^ d;
    c = p, d = q;
  }
  return {{VU((a & 0xffffffffU) | b << 32), VU((c & 0xffffffffU) | d << 32)}};
}

/// While this lives results below the smallest normal number are 0.  AVX-512's scaling takes 55 ns for each other one.
struct FlushToZero {
#if defined(__AVX512F__)
  const unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | _MM_FLUSH_ZERO_ON); }
  ~FlushToZero() { _mm_setcsr(before); }
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;
#endif
};

/// 2^x for x below 127 as 2^n · p(f) with f = x − n: off by less than 2^-22 of itself (over all floats 1.9e-7 on
/// AVX-512, 1.1e-7 elsewhere), exactly 1 at 0, exactly 0 below −126 (under FlushToZero); NaN stays NaN.  Of several
/// vectors at once, step by step, so that each step has as many instructions that do not wait for each other.
template <int kCount>
FOVEA_INLINE void exp2(V (&x)[kCount]) {
#define FOVEA_EACH FOVEA_UNROLL for (int i = 0; i < kCount; ++i)
  V f[kCount], p[kCount];
#if defined(__AVX512F__)
  // f in [0, 1], p(f) off by at most 8.3e-8.
  FOVEA_EACH f[i] = V(_mm512_reduce_ps(__m512(x[i]), 1));
  FOVEA_EACH p[i] = f[i] * 1.867130072435736e-3F + 9.017030315901533e-3F;
  FOVEA_EACH p[i] = p[i] * f[i] + 5.579991310966389e-2F;
  FOVEA_EACH p[i] = p[i] * f[i] + 2.401644501528742e-1F;
  FOVEA_EACH p[i] = p[i] * f[i] + 6.931513118048791e-1F;
  FOVEA_EACH p[i] = p[i] * f[i] + 1.0F;
  FOVEA_EACH x[i] = V(_mm512_maskz_scalef_ps(0xffff, __m512(p[i]), __m512(x[i])));
#else
  // f in [−1/2, 1/2], p(f) off by at most 2.6e-9.  Adding 1.5·2^23 rounds to an integer, whose bits are then the low
  // ones; with 127 more they are a float's exponent.
  const V magic = splat(12583039.0F);
  FOVEA_EACH f[i] = x[i] - ((x[i] + magic) - magic);
  FOVEA_EACH p[i] = f[i] * 1.559467759152009e-4F + 1.3406643906139608e-3F;
  FOVEA_EACH p[i] = p[i] * f[i] + 9.617692974745205e-3F;
  FOVEA_EACH p[i] = p[i] * f[i] + 5.5503105509922275e-2F;
  FOVEA_EACH p[i] = p[i] * f[i] + 2.4022652782877196e-1F;
  FOVEA_EACH p[i] = p[i] * f[i] + 6.93147214968042e-1F;
  FOVEA_EACH p[i] = p[i] * f[i] + 1.0F;
  FOVEA_EACH x[i] = x[i] < splat(-126.0F) ? V{} : p[i] * as_float(as_unsigned(x[i] + magic) << 23);
#endif
#undef FOVEA_EACH
}
FOVEA_INLINE V exp2(V x) {
  V one[1] = {x};
  exp2(one);
  return one[0];
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

FOVEA_INLINE float sum(V x) { return sum_of_group<kWidth>(x)[0]; }

}  // namespace fovea::cpu::FOVEA_ISA
