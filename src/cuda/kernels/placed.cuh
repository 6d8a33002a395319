#pragma once

#include "cuda/kernels/copies.cuh"

// Tiles that stay in global memory, for rows so wide that shared memory has no room for them.  Lanes read what a load
// from shared memory would give them, element by element, so that rows may begin at any element.
namespace fovea::cuda {

/// Row r of the tile is row Order::of_row(r) of those that row_at finds, of which `rows` exist, and of each `columns`:
/// what lies beyond reads as 0 and is not written.
template <Type kElement, int kDim, class Order, class RowAt>
struct PlacedTile {
  static constexpr Type kType = kElement;
  static constexpr int kColumns = kDim;
  RowAt row_at;
  int rows, columns;

  FOVEA_DEVICE bool has(int row, int column) const { return Order::of_row(row) < rows && column < columns; }
  FOVEA_DEVICE auto at(int row, int column) const { return row_at(Order::of_row(row)) + column * kBytes<kType>; }
  FOVEA_DEVICE u32 bits(int row, int column) const {
    if (!has(row, column)) return 0;
    if constexpr (kType == Type::kFloat32) return *reinterpret_cast<const u32*>(at(row, column));
    return *reinterpret_cast<const u16*>(at(row, column));
  }
};

/// Rows `stride` bytes apart.
template <class Byte>
struct StridedRows {
  Byte* first;
  i64 stride;
  FOVEA_DEVICE Byte* operator()(int row) const { return first + row * stride; }
};
template <Type kType, int kDim, class Order = AsTheyAre, class Byte>
FOVEA_DEVICE PlacedTile<kType, kDim, Order, StridedRows<Byte>> place_tile(Byte* first, i64 stride, int rows,
                                                                          int columns) {
  return {{first, stride}, rows, columns};
}

/// A lane's part of an operand at one place of a tile.
template <class Tile>
struct PlacedCorner {
  static constexpr bool kPairs = kBytes<Tile::kType> == 2;  // of elements make a word
  static constexpr int kHalf = kStep<Tile::kType> / 2;      // of a step
  Tile tile;
  int row, column;

  FOVEA_DEVICE u32 bits(int r, int c) const { return tile.bits(row + r, column + c); }
  FOVEA_DEVICE u32 along_row(int r, int c) const { return kPairs ? bits(r, c) | bits(r, c + 1) << 16 : bits(r, c); }
  FOVEA_DEVICE u32 down_column(int r, int c) const { return bits(r, c) | bits(r + 1, c) << 16; }
};

template <Type kType, int kDim, class Order, class RowAt>
using PlacedCornerOf = PlacedCorner<PlacedTile<kType, kDim, Order, RowAt>>;

template <Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE PlacedCornerOf<kType, kDim, Order, RowAt> corner_a(const PlacedTile<kType, kDim, Order, RowAt>& tile,
                                                                int lane, int row, int column) {
  return {tile, row + lane / 4, column + lane % 4 * (4 / kBytes<kType>)};
}
template <Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE PlacedCornerOf<kType, kDim, Order, RowAt> corner_b_rows(const PlacedTile<kType, kDim, Order, RowAt>& tile,
                                                                     int lane, int row, int column) {
  return corner_a(tile, lane, row, column);
}
template <Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE PlacedCornerOf<kType, kDim, Order, RowAt> corner_b_columns(
    const PlacedTile<kType, kDim, Order, RowAt>& tile, int lane, int row, int column) {
  return {tile, row + lane % 4 * 2, column + lane / 4};
}
template <int kN, Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE PlacedCornerOf<kType, kDim, Order, RowAt> corner_c(const PlacedTile<kType, kDim, Order, RowAt>& tile,
                                                                int lane, int row, int column) {
  return {tile, row + lane / 4, column + lane % 4 * 2};
}

template <class Tile>
FOVEA_DEVICE OperandA load_a(const PlacedCorner<Tile>& corner, int row, int k) {
  constexpr int kHalf = PlacedCorner<Tile>::kHalf;
  return {corner.along_row(row, k), corner.along_row(row + 8, k), corner.along_row(row, k + kHalf),
          corner.along_row(row + 8, k + kHalf)};
}
template <class Tile>
FOVEA_DEVICE void load_b_rows(OperandB (&b)[2], const PlacedCorner<Tile>& corner, int n, int k) {
#pragma unroll
  for (int x = 0; x < 2; ++x)
    b[x] = {corner.along_row(n + 8 * x, k), corner.along_row(n + 8 * x, k + PlacedCorner<Tile>::kHalf)};
}
template <class Tile>
FOVEA_DEVICE void load_b_columns(OperandB (&b)[2], const PlacedCorner<Tile>& corner, int k, int n) {
#pragma unroll
  for (int x = 0; x < 2; ++x) {
    if constexpr (PlacedCorner<Tile>::kPairs) {
      b[x] = {corner.down_column(k, n + 8 * x), corner.down_column(k + 8, n + 8 * x)};
    } else {
      b[x] = {corner.bits(k, n + 8 * x), corner.bits(k + 1, n + 8 * x)};
    }
  }
}
template <class Columns = SideBySide, class Tile, int kM, int kN>
FOVEA_DEVICE void store_accumulators(const PlacedCorner<Tile>& corner, const Accumulator (&c)[kM][kN]) {
#pragma unroll
  for (int x = 0; x < kM * kN * 4; ++x) {
    const int i = x / 4 / kN, j = x / 4 % kN, e = x % 4;
    const int row = corner.row + 16 * i + e / 2 * 8, column = corner.column + Columns::offset(j) + e % 2;
    if (corner.tile.has(row, column)) write<Tile::kType>(corner.tile.at(row, column), c[i][j].x[e]);
  }
}
template <Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE float read_entry(const PlacedTile<kType, kDim, Order, RowAt>& tile, int row, int column) {
  return widen<kType>(tile.bits(row, column));
}

// Such a tile needs no copies: its rows are where they are read and written.
template <bool kAsync, int kThreads, class = AsTheyAre, Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE void load_rows(const PlacedTile<kType, kDim, Order, RowAt>&, int, int, bool, const char*, i64) {}
template <int kThreads, class = AsTheyAre, Type kType, int kDim, class Order, class RowAt>
FOVEA_DEVICE void store_rows(const PlacedTile<kType, kDim, Order, RowAt>&, int, int, bool, char*, i64) {}

}  // namespace fovea::cuda
