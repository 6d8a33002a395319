#pragma once

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

/// Fills a tile by `kThreads` threads from rows `stride` bytes apart: `row_bytes` of each; all else, and rows from
/// `rows` on, becomes 0.  The caller closes and awaits the copies.
template <bool kAsync, int kThreads, class Tile>
FOVEA_DEVICE void load_rows(const Tile& tile, int rows, int row_bytes, bool aligned, const char* from, i64 stride) {
  constexpr int kPieces = Tile::kPieces, kStep = kThreads / kPieces;  // rows that the threads copy at once
  const u32 thread = fresh(threadIdx.x);
  if constexpr (kThreads % kPieces == 0 && kStep % 8 == 0) {
    if (aligned && row_bytes % 16 == 0) {
      const int first = static_cast<int>(thread / kPieces), piece = static_cast<int>(thread % kPieces);
      const Corner<Tile> corner{tile.at(first, piece * Tile::kPieceColumns)};
      const int real_rows = piece * 16 < row_bytes ? rows - first : 0;
      const char* at = from + first * stride + piece * 16;
#pragma unroll
      for (int row = 0; row < Tile::kRows; row += kStep) {
        if (Tile::kRows % kStep == 0 || row + first < Tile::kRows)
          copy_or_clear<kAsync>(corner.at(row, 0), at, row < real_rows);
        at += kStep * stride;
      }
      return;
    }
  }
#pragma unroll 1
  for (int at = static_cast<int>(thread); at < Tile::kRows * kPieces; at += kThreads) {
    const int row = at / kPieces, piece = at % kPieces, bytes = row < rows ? row_bytes - piece * 16 : 0;
    const char* place = from + row * stride + piece * 16;
    const u32 to = tile.at(row, piece * Tile::kPieceColumns);
    if (aligned && (bytes >= 16 || bytes <= 0)) {
      copy_or_clear<kAsync>(to, place, bytes > 0);
    } else {
      store_shared_16(to, gather_16(place, bytes));
    }
  }
}

/// Writes the first rows of a tile to rows `stride` bytes apart, `row_bytes` of each.
template <int kThreads, class Tile>
FOVEA_DEVICE void store_rows(const Tile& tile, int rows, int row_bytes, bool aligned, char* to, i64 stride) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kPieces; at += kThreads) {
    const int row = at / Tile::kPieces, piece = at % Tile::kPieces, bytes = row_bytes - piece * 16;
    if (row >= rows || bytes <= 0) continue;
    write_piece(to + row * stride + piece * 16, load_shared_16(tile.at(row, piece * Tile::kPieceColumns)), bytes,
                aligned);
  }
}

}  // namespace fovea::cuda
