#pragma once

#include "cuda/kernels/key_order.cuh"
#include "cuda/kernels/operands.cuh"

// Tiles of rows that lie a stride apart, from global to shared memory and back.
namespace fovea::cuda {

/// 16 bytes, or zeros.
template <bool kAsync>
FOVEA_DEVICE void copy_or_clear(u32 to, const char* from, bool real) {
  if constexpr (kAsync) {
    asm volatile(
        "{\n.reg .pred clear;\nsetp.eq.s32 clear, %2, 0;\n"
        "cp.async.cg.shared.global [%0], [%1], 16, clear;\n}" ::"r"(to),
        "l"(from), "r"(static_cast<int>(real))
        : "memory");
  } else {
    store_shared_16(to, real ? *reinterpret_cast<const uint4*>(from) : uint4{});
  }
}

/// The same of 16 bytes of which only some are there.
template <bool kAsync>
FOVEA_DEVICE void copy_piece(u32 to, const char* from, int bytes, bool aligned) {
  if (aligned && (bytes >= 16 || bytes <= 0)) {
    copy_or_clear<kAsync>(to, from, bytes > 0);
  } else {
    store_shared_16(to, gather_16(from, bytes));
  }
}

/// Fills a tile by `kThreads` threads from rows `stride` bytes apart: `row_bytes` of each; all else, and rows from
/// `rows` on, becomes 0.  Row r of the tile is row Order::of_row(r).  In kParts parts, so that they can leave between
/// the steps of a product and not all at once before it, when they would stand in its way.  The caller closes and
/// awaits the copies.
template <bool kAsync, int kThreads, class Order, int kParts, class Tile>
class RowCopies {
  static constexpr int kPieces = Tile::kPieces, kLanes = kPieces >= 32   ? 32
                                                         : kPieces >= 16 ? 16
                                                         : kPieces >= 8  ? 8
                                                         : kPieces >= 4  ? 4
                                                                         : 2;
  static constexpr int kStep = kThreads / kLanes;  // rows that the threads copy at once
  static constexpr int kSteps = (Tile::kRows + kStep - 1) / kStep;
  static constexpr bool kWhole = !Tile::kSwizzled || kStep % 8 == 0;  // corners know steps of whole rows

  Corner<Tile> corner_;
  const char* from_;
  i64 stride_;
  int rows_, row_bytes_;
  bool fast_;

 public:
  FOVEA_DEVICE RowCopies(const Tile& tile, int rows, int row_bytes, bool aligned, const char* from, i64 stride)
      : stride_(stride), rows_(rows), row_bytes_(row_bytes), fast_(kWhole && aligned && row_bytes % 16 == 0) {
    const u32 thread = fresh(threadIdx.x);
    if (fast_) {
      const int first = static_cast<int>(thread / kLanes), lane = static_cast<int>(thread % kLanes);
      corner_ = {tile.at(first, lane * Tile::kPieceColumns)};
      from_ = from + Order::of_row(first) * stride + lane * 16;
      rows_ = rows - Order::of_row(first);
      row_bytes_ = row_bytes - lane * 16;
      return;
    }
#pragma unroll 1
    for (int at = static_cast<int>(thread); at < Tile::kRows * kPieces; at += kThreads) {
      const int row = at / kPieces, piece = at % kPieces, from_row = Order::of_row(row);
      copy_piece<kAsync>(tile.at(row, piece * Tile::kPieceColumns), from + from_row * stride + piece * 16,
                         from_row < rows ? row_bytes - piece * 16 : 0, aligned);
    }
  }

  /// `part` is a constant where this is called.
  FOVEA_DEVICE void operator()(int part) {
    if (!fast_) return;
    const u32 thread = fresh(threadIdx.x);
#pragma unroll
    for (int step = part * kSteps / kParts; step < (part + 1) * kSteps / kParts; ++step) {
      const int row = step * kStep;
      if (Tile::kRows % kStep != 0 && static_cast<int>(thread / kLanes) + row >= Tile::kRows) break;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kLanes) {
        if (kPieces % kLanes != 0 && piece + static_cast<int>(thread % kLanes) >= kPieces) break;
        copy_or_clear<kAsync>(corner_.at(row, piece * Tile::kPieceColumns), from_ + piece * 16,
                              piece * 16 < row_bytes_ && Order::of_row(row) < rows_);
      }
      from_ += (Order::of_row(row + kStep) - Order::of_row(row)) * stride_;
    }
  }
  FOVEA_DEVICE void all() {
#pragma unroll
    for (int part = 0; part < kParts; ++part) (*this)(part);
  }
  /// All have left: further calls do nothing.
  FOVEA_DEVICE void close() { fast_ = false; }
};

template <bool kAsync, int kThreads, class Order = AsTheyAre, class Tile>
FOVEA_DEVICE void load_rows(const Tile& tile, int rows, int row_bytes, bool aligned, const char* from, i64 stride) {
  RowCopies<kAsync, kThreads, Order, 1, Tile>(tile, rows, row_bytes, aligned, from, stride).all();
}

/// The same where rows lie anywhere: row r at row_at(r).
template <bool kAsync, int kThreads, class Tile, class RowAt>
FOVEA_DEVICE void load_scattered_rows(const Tile& tile, int rows, int row_bytes, bool aligned, const RowAt& row_at) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kPieces; at += kThreads) {
    const int row = at / Tile::kPieces, piece = at % Tile::kPieces;
    copy_piece<kAsync>(tile.at(row, piece * Tile::kPieceColumns), row_at(row < rows ? row : 0) + piece * 16,
                       row < rows ? row_bytes - piece * 16 : 0, aligned);
  }
}

/// Writes the first rows of a tile, in the order that `load_rows` gave them, to rows `stride` bytes apart, `row_bytes`
/// of each.
template <int kThreads, class Order = AsTheyAre, class Tile>
FOVEA_DEVICE void store_rows(const Tile& tile, int rows, int row_bytes, bool aligned, char* to, i64 stride) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kPieces; at += kThreads) {
    const int row = at / Tile::kPieces, piece = at % Tile::kPieces, bytes = row_bytes - piece * 16;
    if (Order::of_row(row) >= rows || bytes <= 0) continue;
    write_piece(to + Order::of_row(row) * stride + piece * 16,
                load_shared_16(tile.at(row, piece * Tile::kPieceColumns)), bytes, aligned);
  }
}

}  // namespace fovea::cuda
