#pragma once

#include "cpu/flash/storage.h"

// The one matrix product of the tiled kernels:  C[m][lanes] = init + Σ_k A(m, k) · B[k][lanes].  A and B are words (of
// floats, or of pairs of bf16), C is floats; a block of C stays in registers while k runs.
namespace fovea::cpu::FOVEA_ISA {

enum class Init { kZero, kAdd };  // C = AB;  C += AB

/// How A lies: a row's words adjacent (K in S = K Qᵀ), or a column's (V in O = Vᵀ P, read without transposing it).
enum class ALayout { kRowMajor, kColumnMajor };

struct ProductArgs {
  const float* a;
  i64 a_stride;  // between rows (kRowMajor) or columns (kColumnMajor)
  const float* b;
  i64 b_stride;
  float* c;
  i64 c_stride;
  i64 depth;  // in words
};

// Pairs on AMX come in tiles of 16 rows by 16 words.  Products go over whole ones, whatever the ISA: rows past the last
// are computed and never read, words past the depth are 0 in both A and B.
template <Word kWord>
inline constexpr i64 kRowStep = kWord == Word::kPair ? 16 : 1;
template <Word kWord>
inline constexpr i64 kDepthStep = kWord == Word::kPair ? 16 : 1;
FOVEA_INLINE i64 whole(i64 count, i64 step) { return (count + step - 1) / step * step; }

/// The words of n elements along the summed index.
template <Word kWord>
FOVEA_INLINE i64 words_of(i64 n) {
  return whole((n + kPerWord<kWord> - 1) / kPerWord<kWord>, kDepthStep<kWord>);
}

/// kRows rows of AB, kVectors vectors wide.  Calls put(place in C, vectors) for each.
template <Word kWord, ALayout kLayout, int kRows, int kVectors, class Put>
FOVEA_INLINE void product_block(const ProductArgs& args, i64 row, Put& put) {
  V acc[kRows][kVectors] = {};
  constexpr bool kRowMajor = kLayout == ALayout::kRowMajor;
  constexpr bool kFewRows = kRows < kVectors;
  constexpr int kFewer = kFewRows ? kRows : kVectors, kMore = kFewRows ? kVectors : kRows;
  const i64 a_row = kRowMajor ? args.a_stride : 1, a_step = kRowMajor ? 1 : args.a_stride;
  const float* a = args.a + row * a_row;
  const float* b = args.b;
  // By 4: a core that runs two threads is bound by instructions, and a fifth of them only counted.
  FOVEA_UNROLL_BY_4 for (i64 k = 0; k < args.depth; ++k) {
    // The fewer operands stay in registers, the others pass by one at a time: 12 sums, 3 and 1 are 16 registers.
    const auto operand = [&](bool of_row, int i) { return of_row ? splat(a[i * a_row]) : load(b + i * kWidth); };
    V few[kFewer];
    FOVEA_UNROLL for (int i = 0; i < kFewer; ++i) few[i] = operand(kFewRows, i);
    FOVEA_UNROLL for (int j = 0; j < kMore; ++j) {
      const V one = operand(!kFewRows, j);
      FOVEA_UNROLL for (int i = 0; i < kFewer; ++i) {
        V& sum = kFewRows ? acc[i][j] : acc[j][i];
        sum = multiply_add<kWord>(one, few[i], sum);
      }
    }
    a += a_step;
    b += args.b_stride;
  }
  FOVEA_UNROLL for (int m = 0; m < kRows; ++m) put(args.c + (row + m) * args.c_stride, acc[m]);
}

#if defined(__AMX_BF16__)
inline constexpr bool kHasTiles = true;

/// The tile registers of this thread, all of 16 rows of 64 bytes, for as long as this lives.
class Tiles {
 public:
  Tiles() {
    alignas(64) std::uint8_t config[64] = {1};  // palette; bytes a row from byte 16, rows from byte 48
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Not the compiler's names for these: GCC's take no number that a template computes, and tell it of no memory.
template <int kTile>
FOVEA_INLINE void load_tile(const float* from, i64 stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride * 4), "i"(kTile) : "memory");
}
template <int kTile>
FOVEA_INLINE void store_tile(float* to, i64 stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride * 4), "i"(kTile) : "memory");
}
template <int kTile>
FOVEA_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
template <int kC, int kA, int kB>
FOVEA_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

/// kRows by kColumns tiles of C.
template <Init kInit, int kRows, int kColumns>
struct TileBlock {
  static constexpr int kCount = kRows * kColumns, kA = 6, kB = 7;
  static_assert(kCount <= kA);

  template <int kTile = 0>
  FOVEA_INLINE static void begin(const float* c, i64 stride) {
    if constexpr (kInit == Init::kZero) clear_tile<kTile>();
    if constexpr (kInit == Init::kAdd)
      load_tile<kTile>(c + kTile / kColumns * 16 * stride + kTile % kColumns * 16, stride);
    if constexpr (kTile + 1 < kCount) begin<kTile + 1>(c, stride);
  }
  template <int kTile = 0>
  FOVEA_INLINE static void step(const float* a, i64 a_stride, const float* b, i64 b_stride) {
    if constexpr (kTile % kColumns == 0) load_tile<kA>(a + kTile / kColumns * 16 * a_stride, a_stride);
    load_tile<kB>(b + kTile % kColumns * 16, b_stride);
    multiply_tiles<kTile, kA, kB>();
    if constexpr (kTile + 1 < kCount) step<kTile + 1>(a, a_stride, b, b_stride);
  }
  template <int kTile = 0>
  FOVEA_INLINE static void end(float* c, i64 stride) {
    store_tile<kTile>(c + kTile / kColumns * 16 * stride + kTile % kColumns * 16, stride);
    if constexpr (kTile + 1 < kCount) end<kTile + 1>(c, stride);
  }

  /// The products alone, for measuring.
  template <int kTile = 0>
  FOVEA_INLINE static void multiply() {
    multiply_tiles<kTile, kA, kB>();
    if constexpr (kTile + 1 < kCount) multiply<kTile + 1>();
  }

  FOVEA_INLINE static void run(const ProductArgs& args, i64 row) {
    float* c = args.c + row * args.c_stride;
    const float* a = args.a + row * args.a_stride;
    begin(c, args.c_stride);
    for (i64 k = 0; k < args.depth; k += 16) step(a + k, args.a_stride, args.b + k * args.b_stride, args.b_stride);
    end(c, args.c_stride);
  }
};
#else
inline constexpr bool kHasTiles = false;
struct Tiles {};  // of a CPU without
#endif

/// Rows [row, rows), kRows at a time, then by halves.
template <Word kWord, ALayout kLayout, int kVectors, int kRows = kAccumulators / kVectors, class Put>
FOVEA_INLINE void product_rows(const ProductArgs& args, i64 row, i64 rows, Put&& put) {
  for (; row + kRows <= rows; row += kRows) product_block<kWord, kLayout, kRows, kVectors>(args, row, put);
  if constexpr (kRows > 1) {
    if (row < rows) product_rows<kWord, kLayout, kVectors, kRows / 2>(args, row, rows, put);
  }
}

/// C is kVectors vectors wide.
template <Word kWord, ALayout kLayout, Init kInit, int kVectors>
[[gnu::noinline]] void product(const ProductArgs& args, i64 rows) {
  rows = whole(rows, kRowStep<kWord>);
#if defined(__AMX_BF16__)
  if constexpr (kWord == Word::kPair) {
    i64 row = 0;
    for (; row + 32 <= rows; row += 32) TileBlock<kInit, 2, kVectors>::run(args, row);
    for (; row < rows; row += 16) TileBlock<kInit, 1, kVectors>::run(args, row);
    return;
  }
#endif
  product_rows<kWord, kLayout, kVectors>(args, 0, rows, [](float* c, const V(&ab)[kVectors]) {
    FOVEA_UNROLL for (int n = 0; n < kVectors; ++n) {  // C is added last: read first, it would keep all of AB waiting
      store(c + n * kWidth, kInit == Init::kZero ? ab[n] : load(c + n * kWidth) + ab[n]);
    }
  });
}

/// C is `vectors` vectors wide, any number: four at a time (two where tiles hold C), then what is left.
template <Word kWord, ALayout kLayout, Init kInit>
inline void product_wide(ProductArgs args, i64 rows, i64 vectors) {
  constexpr int kMost = kWord == Word::kPair && kHasTiles ? 2 : 4;
  for (; vectors >= kMost; vectors -= kMost, args.b += kMost * kWidth, args.c += kMost * kWidth) {
    product<kWord, kLayout, kInit, kMost>(args, rows);
  }
  if constexpr (kMost > 2) {
    if (vectors == 3) product<kWord, kLayout, kInit, 3>(args, rows);
    if (vectors == 2) product<kWord, kLayout, kInit, 2>(args, rows);
  }
  if (vectors == 1) product<kWord, kLayout, kInit, 1>(args, rows);
}

}  // namespace fovea::cpu::FOVEA_ISA
