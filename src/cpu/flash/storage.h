#pragma once

#include "cpu/flash/simd.h"
#include "math/float16.h"

// Rows of elements as the caller keeps them, and as the words that products read.
namespace fovea::cpu::FOVEA_ISA {

FOVEA_INLINE constexpr i64 bytes(Element type) { return type == Element::kFloat32 ? 4 : 2; }

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

using Short = std::uint16_t __attribute__((vector_size(kWidth * 2)));
using LooseShort __attribute__((aligned(2), may_alias)) = Short;

// Conversions of whole vectors for which GCC's __builtin_convertvector goes element by element.
FOVEA_INLINE VU widen_shorts(Short x) {
#if defined(__AVX512F__)
  return VU(_mm512_cvtepu16_epi32(__m256i(x)));
#elif defined(__AVX2__)
  return VU(_mm256_cvtepu16_epi32(__m128i(x)));
#else
  return __builtin_convertvector(x, VU);
#endif
}
FOVEA_INLINE V widen_halves(Short x) {
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

FOVEA_INLINE V widen_elements(Short x, Element type) {
  return type == Element::kBFloat16 ? as_float(widen_shorts(x) << 16) : widen_halves(x);
}

FOVEA_INLINE Short load_shorts(const char* p) { return *reinterpret_cast<const LooseShort*>(p); }
FOVEA_INLINE V widen_vector(const char* p, Element type) {
  return type == Element::kFloat32 ? load(reinterpret_cast<const float*>(p)) : widen_elements(load_shorts(p), type);
}

/// The fp32 elements that words are, or the first or second of the 16-bit ones that they hold.
FOVEA_INLINE V element_of_words(V words, Element type, bool second) {
  if (type == Element::kFloat32) return words;
  const VU bits = second ? as_unsigned(words) & 0xffff0000U : as_unsigned(words) << 16;
  return type == Element::kBFloat16 ? as_float(bits) : widen_halves(__builtin_convertvector(bits >> 16, Short));
}

/// The bits of the nearest bf16, in the upper half of each lane; NaN stays NaN.
FOVEA_INLINE VU nearest_bf16(V x) {
  const VU bits = as_unsigned(x), rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  const VI nan = (bits & 0x7fffffffU) > 0x7f800000U;
  return (nan ? bits | 0x400000U : rounded) & 0xffff0000U;
}

FOVEA_INLINE void narrow_vector(char* p, Element type, V x) {
  if (type == Element::kFloat32) return store(reinterpret_cast<float*>(p), x);
  Short r{};
  if (type == Element::kBFloat16) {
    r = __builtin_convertvector(nearest_bf16(x) >> 16, Short);
  } else {
#if defined(__AVX512F__)
    r = Short(_mm512_cvtps_ph(__m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    r = Short(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kWidth; ++i) r[i] = math::half_of_float(x[i]);
#endif
  }
  *reinterpret_cast<LooseShort*>(p) = r;
}

inline void narrow_row(char* to, const float* from, Element type, i64 n) {
  i64 i = 0;
  for (; i + kWidth <= n; i += kWidth) narrow_vector(to + i * bytes(type), type, load(from + i));
  for (; i < n; ++i) narrow(to + i * bytes(type), type, from[i]);
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
  float rest = 0.0F;
  for (; i < n; ++i) rest += (to[i] = widen(from + i * bytes(type), type)) * 0.0F;
  for (; i < padded; ++i) to[i] = 0.0F;
  return rest == 0.0F && !any(taint != V{});
}

/// The same for bf16 as pairs of neighbours, n elements to `words` words.
inline bool pair_row(float* to, const char* from, i64 n, i64 words) {
  constexpr std::uint32_t kLow = 0x7f80U, kHigh = kLow << 16;
  VI bad{};  // a half with all bits of its exponent set
  const auto put = [&](i64 w, V x) {
    const VU bits = as_unsigned(x);
    bad |= ((bits & kLow) == kLow) | ((bits & kHigh) == kHigh);
    store(to + w, x);
  };
  i64 w = 0;
  for (; 2 * (w + kWidth) <= n; w += kWidth) put(w, load(reinterpret_cast<const float*>(from + 4 * w)));
  if (2 * w < n) {
    alignas(64) std::uint16_t rest[2 * kWidth] = {};
    for (i64 x = 2 * w; x < n; ++x) rest[x - 2 * w] = reinterpret_cast<const std::uint16_t*>(from)[x];
    put(w, load(reinterpret_cast<const float*>(rest)));
    w += kWidth;
  }
  for (; w < words; w += kWidth) store(to + w, V{});
  return !any(bad);
}

template <Word kWord>
inline bool pack_row(float* to, const char* from, Element type, i64 n, i64 words) {
  if constexpr (kWord == Word::kPair) return pair_row(to, from, n, words);
  return widen_row(to, from, type, n, words);
}

/// to[w][r] = from[r][w], floats times `factor`, for whole vectors of rows and any number of words, which rows of
/// `from` pad to whole vectors.
template <Word kWord>
inline void transpose_words(float* to, i64 to_stride, const float* from, i64 from_stride, i64 rows, i64 words,
                            float factor) {
  for (i64 r = 0; r < rows; r += kWidth) {
    for (i64 w = 0; w < words; w += kWidth) {
      V x[kWidth];
      FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) x[i] = load(from + (r + i) * from_stride + w);
      transpose(x);
      const i64 count = math::smaller(words - w, i64{kWidth});
      FOVEA_UNROLL for (int i = 0; i < kWidth; ++i) {
        if (i < count) store(to + (w + i) * to_stride + r, kWord == Word::kFloat ? x[i] * factor : x[i]);
      }
    }
  }
}

/// Elements of two rows of bf16 as pairs.
FOVEA_INLINE V pair_of_rows(const float* first, const float* second, i64 element) {
  const auto at = [element](const float* row) {
    return widen_shorts(load_shorts(reinterpret_cast<const char*>(row) + 2 * element));
  };
  return as_float(at(first) | (at(second) << 16));
}

#if defined(__AVX512BF16__)
/// Two vectors rounded to bf16, one after the other.
FOVEA_INLINE V round_to_pairs(V first, V second) { return V(_mm512_cvtne2ps_pbh(__m512(second), __m512(first))); }

/// Those two, lane by lane side by side.
FOVEA_INLINE V side_by_side(V pairs) {
  const auto zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                    20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return V(_mm512_permutexvar_epi16(zip, __m512i(pairs)));
}

/// Both at once, faster, with halves rounded up; NaN may become 0.
FOVEA_INLINE V round_side_by_side(V first, V second) {
  const VU even = as_unsigned(first) + 0x8000U, odd = as_unsigned(second) + 0x8000U;
  const auto from_high = _mm512_set4_epi32(~0x7f7ff0f1, ~0x7f7ff4f5, ~0x7f7ff8f9, ~0x7f7ffcfd);
  return V(_mm512_mask_shuffle_epi8(__m512i(odd), 0x3333333333333333U, __m512i(even), from_high));
}

/// Elements of two rows as pairs, in the order of halves of 128 bits: words 0 to 3 of each, then words 4 to 7.
FOVEA_INLINE void pair_rows(V (&pairs)[2], V first, V second) {
  pairs[0] = V(_mm512_unpacklo_epi16(__m512i(first), __m512i(second)));
  pairs[1] = V(_mm512_unpackhi_epi16(__m512i(first), __m512i(second)));
}

/// Those two, each to a place of its own.
FOVEA_INLINE void store_apart(float* first, float* second, V pairs) {
  _mm256_storeu_ps(first, _mm512_castps512_ps256(__m512(pairs)));
  _mm256_storeu_ps(second, _mm512_extractf32x8_ps(__m512(pairs), 1));
}
#else
V round_to_pairs(V first, V second);  // of a CPU without, and never called
V side_by_side(V pairs);
V round_side_by_side(V first, V second);
void pair_rows(V (&pairs)[2], V first, V second);
void store_apart(float* first, float* second, V pairs);
#endif

}  // namespace fovea::cpu::FOVEA_ISA
