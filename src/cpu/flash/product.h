#pragma once

#include "cpu/flash/simd.h"

// The one matrix product of the tiled kernels:  C[m][lanes] = init + Σ_k A(m, k) · B[k][lanes].  A is broadcast, B and
// C are vectors of lanes; a block of C (kAccumulators registers) stays in registers while k runs.
namespace fovea::cpu::FOVEA_ISA {

enum class Init { kZero, kAdd, kScaleAdd };  // C = AB;  C += AB;  C = C·scale + AB, one scale a lane

/// How A lies: a row's elements adjacent (K in S = K Qᵀ), or a column's (V in O = Vᵀ P, read without transposing it).
enum class ALayout { kRowMajor, kColumnMajor };

struct ProductArgs {
  const float* a;
  i64 a_stride;  // between rows (kRowMajor) or columns (kColumnMajor)
  const float* b;
  i64 b_stride;
  float* c;
  i64 c_stride;
  i64 depth;
  const float* scale;  // kScaleAdd: one a lane
};

/// kRows rows of C, kVectors vectors wide.
template <ALayout kLayout, Init kInit, int kRows, int kVectors>
FOVEA_INLINE void product_block(const ProductArgs& args, i64 row) {
  V acc[kRows][kVectors];
  float* c = args.c + row * args.c_stride;
  FOVEA_UNROLL for (int m = 0; m < kRows; ++m) {
    FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {
      if constexpr (kInit == Init::kZero) acc[m][n] = V{};
      if constexpr (kInit != Init::kZero) acc[m][n] = load(c + m * args.c_stride + n * kWidth);
      if constexpr (kInit == Init::kScaleAdd) acc[m][n] *= load(args.scale + n * kWidth);
    }
  }
  constexpr bool kRowMajor = kLayout == ALayout::kRowMajor;
  const float* a = args.a + row * (kRowMajor ? args.a_stride : 1);
  const float* b = args.b;
  for (i64 k = 0; k < args.depth; ++k) {
    V bk[kVectors];
    FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) bk[n] = load(b + n * kWidth);
    FOVEA_UNROLL for (int m = 0; m < kRows; ++m) {
      const V am = splat(a[kRowMajor ? m * args.a_stride : m]);
      FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) acc[m][n] += am * bk[n];
    }
    a += kRowMajor ? 1 : args.a_stride;
    b += args.b_stride;
  }
  FOVEA_UNROLL for (int m = 0; m < kRows; ++m) {
    FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) store(c + m * args.c_stride + n * kWidth, acc[m][n]);
  }
}

/// Rows [row, rows), as many at a time as registers allow, then by halves.
template <ALayout kLayout, Init kInit, int kVectors, int kRows = kAccumulators / kVectors>
inline void product_rows(const ProductArgs& args, i64 row, i64 rows) {
  for (; row + kRows <= rows; row += kRows) product_block<kLayout, kInit, kRows, kVectors>(args, row);
  if constexpr (kRows > 1) {
    if (row < rows) product_rows<kLayout, kInit, kVectors, kRows / 2>(args, row, rows);
  }
}

/// C is kVectors vectors wide.
template <ALayout kLayout, Init kInit, int kVectors>
[[gnu::noinline]] void product(const ProductArgs& args, i64 rows) {
  product_rows<kLayout, kInit, kVectors>(args, 0, rows);
}

/// C is `vectors` vectors wide, any number: four at a time, then what is left.
template <ALayout kLayout, Init kInit>
inline void product_wide(ProductArgs args, i64 rows, i64 vectors) {
  for (; vectors >= 4; vectors -= 4, args.b += 4 * kWidth, args.c += 4 * kWidth) {
    product<kLayout, kInit, 4>(args, rows);
  }
  if (vectors == 3) product<kLayout, kInit, 3>(args, rows);
  if (vectors == 2) product<kLayout, kInit, 2>(args, rows);
  if (vectors == 1) product<kLayout, kInit, 1>(args, rows);
}

}  // namespace fovea::cpu::FOVEA_ISA
