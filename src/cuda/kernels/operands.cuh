#pragma once

#include "cuda/backward_plan.h"
#include "cuda/kernels/mma.cuh"

// Operands by way of corners: the part of an address that depends on the lane and its warp is computed once a product,
// and each load adds a constant.
namespace fovea::cuda {

/// A tile without padding: pieces of 16 bytes are permuted within 128 bytes, in another way in each of 8 rows; within
/// 64 bytes, in another way in each of 4 pairs of rows, where a row is an odd number of these.
template <Type kElement, int kRowCount, int kDim>
struct SwizzledTile {
  static constexpr Type kType = kElement;
  static constexpr int kRows = kRowCount, kColumns = kDim, kPieceColumns = 16 / kBytes<kType>;
  static constexpr int kPieces = kDim * kBytes<kType> / 16;
  static constexpr int kPitch = kPieces * 16;
  static constexpr int kSize = kRows * kPitch;
  static constexpr bool kSwizzled = true;
  static constexpr int kTurns = kPieces % 8 == 0 ? 8 : 4;  // pieces that change places
  u32 base;                                                // a multiple of 128

  FOVEA_DEVICE u32 at(int row, int column) const {
    const u32 piece = static_cast<u32>(column) / 8, r = static_cast<u32>(row), turned = kTurns == 8 ? r : r / 2;
    return base + r * kPitch + piece / kTurns * (kTurns * 16) + ((piece ^ turned) & (kTurns - 1)) * 16 +
           static_cast<u32>(column) % 8 * 2;
  }
};

template <Type kType, int kRows, int kDim, bool kSwizzled>
struct TileOf {
  using Is = SharedTile<kType, kRows, kDim>;
};
template <Type kType, int kRows, int kDim>
struct TileOf<kType, kRows, kDim, true> {
  using Is = SwizzledTile<kType, kRows, kDim>;
};
/// By default swizzled where rows are a power of 2: no step carries there, wherever a warp's columns begin.
template <Type kType, int kRows, int kDim, bool kSwizzles = is_power_of_2(kDim)>
using Tile = typename TileOf<kType, kRows, kDim, kSwizzles && swizzled(kType, kDim)>::Is;

/// The address of a lane's part of an operand at one place of a tile, from which those at a constant distance follow:
/// rows and columns in whole steps of 8, columns without a carry out of the first place's, so the swizzle is one xor.
template <class Tile>
struct Corner {
  u32 lane;
  FOVEA_DEVICE u32 at(int row, int column) const {
    if constexpr (Tile::kSwizzled) {
      constexpr int kColumns = 8 * Tile::kTurns;
      return (lane ^ static_cast<u32>(column % kColumns / 8 * 16)) +
             static_cast<u32>(column / kColumns * kColumns * 2 + row * Tile::kPitch);
    } else {
      return lane + static_cast<u32>(row * Tile::kPitch + column * kBytes<Tile::kType>);
    }
  }
};

#if __CUDA_ARCH__ >= 900
inline constexpr bool kStoresMatrices = true;
#else
inline constexpr bool kStoresMatrices = false;
#endif

/// The inverse of `load_matrices`.
FOVEA_DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
#endif
}

// `lane` is the lane's number, through `fresh` where what is computed from it is not to be kept in registers.

/// For `load_a` and, paired, for the A that goes with `load_b_columns`: fp32 then takes a step's columns in the order
/// 0, 2, 4, 6, 1, 3, 5, 7.
template <bool kPaired = false, class Tile>
FOVEA_DEVICE Corner<Tile> corner_a(const Tile& tile, int lane, int row, int column) {
  if constexpr (kPaired && Tile::kType == Type::kFloat32) return {tile.at(row + lane / 4, column + lane % 4 * 2)};
  return {tile.at(row + lane % 16, column + lane / 16 * Tile::kPieceColumns)};
}
/// For `load_b_rows`.
template <class Tile>
FOVEA_DEVICE Corner<Tile> corner_b_rows(const Tile& tile, int lane, int row, int column) {
  return {tile.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * Tile::kPieceColumns)};
}
/// For `load_a_columns`.
template <class Tile>
FOVEA_DEVICE Corner<Tile> corner_a_columns(const Tile& tile, int lane, int row, int column) {
  if constexpr (Tile::kType == Type::kFloat32) return {tile.at(row + lane % 4 * 2, column + lane / 4)};
  return {tile.at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8)};
}
/// For `load_b_columns`.
template <class Tile>
FOVEA_DEVICE Corner<Tile> corner_b_columns(const Tile& tile, int lane, int row, int column) {
  if constexpr (Tile::kType == Type::kFloat32) return {tile.at(row + lane % 4 * 2, column + lane / 4)};
  return {tile.at(row + lane % 16, column + lane / 16 * 8)};
}
/// Whether a row of N accumulators is stored as whole matrices, two at a time.
template <class Tile, int kN>
inline constexpr bool kByMatrices = kStoresMatrices && (Tile::kType != Type::kFloat32) && (kN % 2 == 0);
/// For `store_accumulators` of N side by side.
template <int kN, class Tile>
FOVEA_DEVICE Corner<Tile> corner_c(const Tile& tile, int lane, int row, int column) {
  if constexpr (kByMatrices<Tile, kN>) return corner_a(tile, lane, row, column);
  return {tile.at(row + lane / 4, column + lane % 4 * 2)};
}

/// A = rows [row, row + 16), columns [k, k + kStep).  An 8 × 8 matrix of ldmatrix is 8 rows of 16 bytes, of which each
/// lane receives a word: that is how both kinds of operand lie.
template <bool kPaired = false, class Tile>
FOVEA_DEVICE OperandA load_a(const Corner<Tile>& corner, int row, int k) {
  OperandA a;
  if constexpr (kPaired && Tile::kType == Type::kFloat32) {
    a.x[0] = load_shared(corner.at(row, k));
    a.x[1] = load_shared(corner.at(row + 8, k));
    a.x[2] = load_shared(corner.at(row, k) + 4);
    a.x[3] = load_shared(corner.at(row + 8, k) + 4);
  } else {
    load_matrices(a.x, corner.at(row, k));
  }
  return a;
}
/// A = (the tile)ᵀ: rows [row, row + 16) are its columns, [k, k + kStep) its rows.
template <class Tile>
FOVEA_DEVICE OperandA load_a_columns(const Corner<Tile>& corner, int row, int k) {
  OperandA a;
  if constexpr (Tile::kType == Type::kFloat32) {
    a.x[0] = load_shared(corner.at(k, row));
    a.x[1] = load_shared(corner.at(k, row + 8));
    a.x[2] = load_shared(corner.at(k, row) + Tile::kPitch);
    a.x[3] = load_shared(corner.at(k, row + 8) + Tile::kPitch);
  } else {
    load_matrices_transposed(a.x, corner.at(k, row));
  }
  return a;
}
/// Two B side by side, B[k][n] = tile[n][k].
template <class Tile>
FOVEA_DEVICE void load_b_rows(OperandB (&b)[2], const Corner<Tile>& corner, int n, int k) {
  u32 x[4];
  load_matrices(x, corner.at(n, k));
  b[0] = {x[0], x[1]};
  b[1] = {x[2], x[3]};
}
/// Two B side by side, B[k][n] = tile[k][n].  For fp32 a step takes the rows in the order in which an accumulator has
/// them (`operand_a`): 0, 2, 4, 6, 1, 3, 5, 7.
template <class Tile>
FOVEA_DEVICE void load_b_columns(OperandB (&b)[2], const Corner<Tile>& corner, int k, int n) {
  if constexpr (Tile::kType == Type::kFloat32) {
#pragma unroll
    for (int x = 0; x < 2; ++x)
      b[x] = {load_shared(corner.at(k, n + 8 * x)), load_shared(corner.at(k, n + 8 * x) + Tile::kPitch)};
  } else {
    u32 x[4];
    load_matrices_transposed(x, corner.at(k, n));
    b[0] = {x[0], x[1]};
    b[1] = {x[2], x[3]};
  }
}
/// Where accumulators of 8 columns lie, side by side.
struct SideBySide {
  FOVEA_DEVICE static constexpr int offset(int j) { return 8 * j; }
};
/// Writes a piece of a tile from its corner's column `column` on, a multiple of 8 · N.
template <class Columns = SideBySide, class Tile, int kM, int kN>
FOVEA_DEVICE void store_accumulators(const Corner<Tile>& corner, const Accumulator (&c)[kM][kN], int column = 0) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const Accumulator& left = c[i][j];
      if constexpr (Tile::kType == Type::kFloat32) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const u32 at = corner.at(16 * i + 8 * h, column + Columns::offset(j));
          store_shared(at, __float_as_uint(left.x[2 * h]));
          store_shared(at + 4, __float_as_uint(left.x[2 * h + 1]));
        }
      } else if constexpr (kByMatrices<Tile, kN>) {
        const Accumulator& right = c[i][j | 1];
        if (j % 2 == 0) {
          store_matrices(corner.at(16 * i, column + Columns::offset(j)), pack<Tile::kType>(left.x[0], left.x[1]),
                         pack<Tile::kType>(left.x[2], left.x[3]), pack<Tile::kType>(right.x[0], right.x[1]),
                         pack<Tile::kType>(right.x[2], right.x[3]));
        }
      } else {
        store_shared(corner.at(16 * i, column + Columns::offset(j)), pack<Tile::kType>(left.x[0], left.x[1]));
        store_shared(corner.at(16 * i + 8, column + Columns::offset(j)), pack<Tile::kType>(left.x[2], left.x[3]));
      }
    }
  }
}
template <Type kType>
FOVEA_DEVICE float read_shared(u32 address) {
  if constexpr (kType == Type::kFloat32) {
    return __uint_as_float(load_shared(address));
  } else {
    return widen<kType>(load_shared(address & ~3U) >> (address & 2U) * 8 & 0xffffU);
  }
}
template <class Tile>
FOVEA_DEVICE float read_entry(const Tile& tile, int row, int column) {
  return read_shared<Tile::kType>(tile.at(row, column));
}

/// C = A · B + `start`, which is kept.
template <Type kType, Mma kMma, class A>
FOVEA_DEVICE void multiply(Accumulator& c, Accumulator& small, const A& a, const OperandB& b,
                           const Accumulator& start) {
  if constexpr (kMma == Mma::kHalf16 && kType == Type::kFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(c.x[0]), "=f"(c.x[1]), "=f"(c.x[2]), "=f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]), "f"(start.x[0]),
          "f"(start.x[1]), "f"(start.x[2]), "f"(start.x[3]));
  } else if constexpr (kMma == Mma::kHalf16 && kType == Type::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
        "%12, %13};"
        : "=f"(c.x[0]), "=f"(c.x[1]), "=f"(c.x[2]), "=f"(c.x[3])
        : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]), "f"(start.x[0]),
          "f"(start.x[1]), "f"(start.x[2]), "f"(start.x[3]));
  } else {
    c = start;
    multiply_add<kType, kMma>(c, small, a, b);
  }
}

template <int kM, int kN>
FOVEA_DEVICE void clear(Accumulator (&c)[kM][kN]) {
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int j = 0; j < kN; ++j) c[i][j] = {};
  }
}

struct OnTop {};  // as the start of a product: add to what C holds already
template <class Start>
inline constexpr bool kIsOnTop = false;
template <>
inline constexpr bool kIsOnTop<OnTop> = true;

struct Nothing {
  FOVEA_DEVICE void operator()(int, int) const {}
};

/// C = A · B + start(i) of its rows, or C += A · B with `OnTop`.  a(i, k) loads 16 rows of A, b(pair, j, k) 16 columns
/// of B, of step k.  fp32 sums that go on top, and every kChain steps of TF32 and Turing's fp16, are made apart and
/// added by ordinary additions, for the reason that `multiply_add` gives; where all make no longer chain, one sum will
/// do. Loops are unrolled in part: whole ones take long to compile and more registers than there are; only where A is
/// in registers (kAtOnce) must they be.  `between(k, j)` is called once for each step and each two columns of pieces.
template <auto S, int kSteps, bool kAtOnce = false, int kM, int kN, class A, class B, class Start,
          class Between = Nothing>
FOVEA_DEVICE void multiply_steps(Accumulator (&c)[kM][kN], const A& a, const B& b, const Start& start,
                                 const Between& between = {}) {
  constexpr bool kOnTop = kIsOnTop<Start>, kHalves = is_tf32(S.mma), kByShuffles = S.mma == Mma::kShuffles;
  constexpr int kChain = kHalves || S.mma == Mma::kHalf8 ? math::smaller(kSteps, 16) : kSteps;
  constexpr bool kApart = (kOnTop && S.type == Type::kFloat32) || kChain < kSteps;
  constexpr bool kTwoSums = kHalves && !(kOnTop && 3 * kSteps <= 16);
  constexpr bool kNarrow =  // sums beside C want registers
      kHalves ? kTwoSums && (kOnTop || kM * kN > 8) : kApart;
  constexpr int kWidth = !kNarrow ? kN : kN % 4 == 0 ? 4 : 2;
  constexpr int kMost = kAtOnce       ? kSteps
                        : kByShuffles ? 1
                        : S.in_place  ? 1
                        : kHalves     ? 4
                                      : 16,
                kUnroll = math::smaller(kSteps, kMost);
  constexpr bool kRolled = kUnroll < kSteps || kByShuffles;
  if constexpr (kRolled) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int j = 0; j < kN; j += 2) between(k, j);
    }
  }
  if constexpr (kRolled && !kOnTop) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int j = 0; j < kN; ++j) c[i][j] = start(i);
    }
  }
#pragma unroll
  for (int first = 0; first < kN; first += kWidth) {
#pragma unroll 1
    for (int chain = 0; chain < kSteps; chain += kChain) {
      Accumulator apart[kApart ? kM : 1][kApart ? kWidth : 1], small[kTwoSums ? kM : 1][kTwoSums ? kWidth : 1];
      clear(apart);
      clear(small);
#pragma unroll kUnroll
      for (int step = 0; step < kChain; ++step) {
        const int k = kChain == kSteps ? step : chain + step;
        if (kSteps % kChain != 0 && k >= kSteps) break;
        decltype(a(0, 0)) rows[kM];
#pragma unroll
        for (int i = 0; i < kM; ++i) rows[i] = a(i, k * kStep<S.type>);
#pragma unroll
        for (int j = 0; j < kWidth; j += 2) {
          if (!kRolled) between(k, first + j);
          OperandB columns[2];
          b(columns, first + j, k * kStep<S.type>);
          if constexpr (kByShuffles) {
            multiply_add_by_shuffles<S.type>(rows, columns, [&](int i, int x) -> Accumulator& {
              return kApart ? apart[kApart ? i : 0][kApart ? j + x : 0] : c[i][first + j + x];
            });
          } else {
#pragma unroll
            for (int i = 0; i < kM; ++i) {
#pragma unroll
              for (int x = 0; x < 2; ++x) {
                Accumulator& sum = kApart ? apart[kApart ? i : 0][kApart ? j + x : 0] : c[i][first + j + x];
                Accumulator& rest = kTwoSums ? small[kTwoSums ? i : 0][kTwoSums ? j + x : 0] : sum;
                if constexpr (kOnTop || kRolled) {
                  multiply_add<S.type, S.mma>(sum, rest, rows[i], columns[x]);
                } else if (k == 0) {
                  multiply<S.type, S.mma>(sum, rest, rows[i], columns[x], start(i));
                } else {
                  multiply_add<S.type, S.mma>(sum, rest, rows[i], columns[x]);
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kM; ++i) {
#pragma unroll
        for (int x = 0; x < kWidth * 4; ++x) {
          float& to = c[i][first + x / 4].x[x % 4];
          if constexpr (kApart && kTwoSums) to += apart[i][x / 4].x[x % 4] + small[i][x / 4].x[x % 4];
          if constexpr (kApart && !kTwoSums) to += apart[i][x / 4].x[x % 4];
          if constexpr (!kApart && kTwoSums) to += small[i][x / 4].x[x % 4];
        }
      }
    }
  }
}

}  // namespace fovea::cuda
