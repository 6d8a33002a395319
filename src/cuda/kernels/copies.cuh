#pragma once

#include "cuda/kernels/key_order.cuh"
#include "cuda/kernels/operands.cuh"

// Tiles of rows that lie a stride apart, from global to shared memory and back.
namespace fovea::cuda {

/// L2 eviction policies: for what is read once; what a few blocks share; what is used again and again.
enum class Keep : u64 { kNo = 0x12f0000000000000UL, kAwhile = 0x1000000000000000UL, kYes = 0x14f0000000000000UL };

/// 16 bytes, or zeros.
template <bool kAsync>
FOVEA_DEVICE void copy_or_clear(u32 to, const char* from, bool real) {
  if constexpr (kAsync) {
    asm volatile(
        "{\n.reg .pred clear;\nsetp.eq.s32 clear, %2, 0;\n"
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, clear;\n}" ::"r"(to),
        "l"(from), "r"(static_cast<int>(real))
        : "memory");
  } else {
    store_shared_16(to, real ? *reinterpret_cast<const uint4*>(from) : uint4{});
  }
}

/// The same of 16 bytes of which only the first `bytes` exist; the others become 0.
template <bool kAsync>
FOVEA_DEVICE void copy_piece(u32 to, const char* from, int bytes, bool aligned) {
  if (aligned && (bytes >= 16 || bytes <= 0)) {
    copy_or_clear<kAsync>(to, from, bytes > 0);
  } else {
    store_shared_16(to, gather_16(from, bytes));
  }
}

/// Copies the rows of a tile, `stride` bytes apart, by `kThreads` threads in pieces of 16 bytes: `row_bytes` of each
/// row; the rest of a row, and rows from `rows` on, becomes 0.  Row r of the tile is row Order::of_row(r).  In kParts
/// parts, which can be issued between the steps of a product, where they delay it less than all at once before it.  The
/// caller closes and awaits the copies.
template <bool kAsync, int kThreads, class Order, int kParts, class Tile>
class RowCopies {
  static constexpr int kPieces = Tile::kPieces,
                       kLanes = math::smaller(kPieces & -kPieces, kWarp);  // of a row at once: no lane is ever idle
  static constexpr int kStep = kThreads / kLanes;                          // rows that the threads copy at once
  static constexpr int kSteps = (Tile::kRows + kStep - 1) / kStep;

  Corner<Tile> corner_;
  const char* from_;
  u32 stride_;
  int rows_, row_bytes_;

 public:
  /// A swizzled `Corner` moves in steps of 8 rows, or of rows whose last bits no thread's first row has.
  static constexpr bool kCan = !Tile::kSwizzled || (kStep & (kStep - 1)) == 0;

  /// From a tile's first byte to the first that this thread copies; the stride is below 2^32.
  FOVEA_DEVICE static u64 first_byte(u32 stride) {
    return u64{static_cast<u32>(Order::of_row(threadIdx.x / kLanes))} * stride + threadIdx.x % kLanes * 16;
  }
  FOVEA_DEVICE RowCopies(const Tile& tile, int rows, int row_bytes, const char* first, u32 stride)
      : from_(first), stride_(stride) {
    const u32 thread = fresh(threadIdx.x), row = thread / kLanes, lane = thread % kLanes;
    corner_ = {tile.at(static_cast<int>(row), static_cast<int>(lane) * Tile::kPieceColumns)};
    rows_ = rows - Order::of_row(row);
    row_bytes_ = row_bytes - static_cast<int>(lane) * 16;
  }

  /// `part` is a constant where this is called.
  FOVEA_DEVICE void operator()(int part) const {
    const u32 thread = fresh(threadIdx.x);
#pragma unroll
    for (int step = part * kSteps / kParts; step < (part + 1) * kSteps / kParts; ++step) {
      const int row = step * kStep, turned = Tile::kSwizzled ? row % 8 : 0;
      if (Tile::kRows % kStep != 0 && static_cast<int>(thread / kLanes) + row >= Tile::kRows) break;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kLanes) {
        copy_or_clear<kAsync>(corner_.at(row, (piece ^ turned) * Tile::kPieceColumns),
                              from_ + u64{static_cast<u32>(Order::of_row(row))} * stride_ + piece * 16,
                              piece * 16 < row_bytes_ && Order::of_row(row) < rows_);
      }
    }
  }
  FOVEA_DEVICE void all() const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) (*this)(part);
  }
};

/// The same for rows anywhere, row r at row_at(r), of any length and alignment.
template <bool kAsync, int kThreads, class Order = AsTheyAre, class Tile, class RowAt>
FOVEA_DEVICE void load_scattered_rows(const Tile& tile, int rows, int row_bytes, bool aligned, const RowAt& row_at) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kPieces; at += kThreads) {
    const int to = at / Tile::kPieces, piece = at % Tile::kPieces, row = Order::of_row(to);
    copy_piece<kAsync>(tile.at(to, piece * Tile::kPieceColumns), row_at(row < rows ? row : 0) + piece * 16,
                       row < rows ? row_bytes - piece * 16 : 0, aligned);
  }
}

/// Fills a tile from rows `stride` bytes apart, by `RowCopies` where they are made of whole pieces.
template <bool kAsync, int kThreads, class Order = AsTheyAre, class Tile>
FOVEA_DEVICE void load_rows(const Tile& tile, int rows, int row_bytes, bool aligned, const char* from, i64 stride) {
  using Copies = RowCopies<kAsync, kThreads, Order, 1, Tile>;
  if (Copies::kCan && aligned && row_bytes % 16 == 0 && stride == i64{static_cast<u32>(stride)}) {
    Copies(tile, rows, row_bytes, from + Copies::first_byte(static_cast<u32>(stride)), static_cast<u32>(stride)).all();
  } else {
    load_scattered_rows<kAsync, kThreads, Order>(tile, rows, row_bytes, aligned,
                                                 [&](int row) { return from + row * stride; });
  }
}

/// Writes the first rows of a tile, in the order that `load_rows` gave them, to rows `stride` bytes apart, `row_bytes`
/// of each.
template <int kThreads, class Order = AsTheyAre, class Tile>
FOVEA_DEVICE void store_rows(const Tile& tile, int rows, int row_bytes, bool aligned, char* to, i64 stride) {
  constexpr int kCount = Tile::kRows * Tile::kPieces, kAtOnce = 4;
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < kCount; at += kAtOnce * kThreads) {
    uint4 pieces[kAtOnce];
    const auto place = [at](int n) { return math::smaller(at + n * kThreads, kCount - 1); };
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      pieces[n] = load_shared_16(tile.at(place(n) / Tile::kPieces, place(n) % Tile::kPieces * Tile::kPieceColumns));
    }
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n) {
      const int row = Order::of_row(place(n) / Tile::kPieces), offset = place(n) % Tile::kPieces * 16;
      if (at + n * kThreads < kCount && row < rows && offset < row_bytes) {
        write_piece(to + row * stride + offset, pieces[n], row_bytes - offset, aligned);
      }
    }
  }
}

}  // namespace fovea::cuda
