#pragma once

#include "cuda/kernels/mma.cuh"

// Where the rows and keys of one sequence lie, and what they may see.
namespace fovea::cuda {

struct Sequence {
  int batch;
  int q_begin, q_rows;    // rows of out to be written; band.seqlen_q of them are real
  int kv_begin, kv_rows;  // rows of dk and dv to be written; band.seqlen_kv of them are real
  Band band;

  FOVEA_DEVICE static Sequence of(const CallParams& p, int b) {
    Sequence s{b, 0, p.seqlen_q, 0, p.seqlen_kv, {}};
    // The host cannot see these numbers: whatever they are, nothing outside the tensors is touched.
    const auto number = [](const IndexView& view, int i, int most) {
      return math::smaller(math::larger(view.data[i * view.stride], 0), most);
    };
    if (p.cu_seqlens_q.data != nullptr) {
      s.q_begin = number(p.cu_seqlens_q, b, p.total_q);
      s.q_rows = math::smaller(math::larger(number(p.cu_seqlens_q, b + 1, p.total_q) - s.q_begin, 0), p.seqlen_q);
      s.kv_begin = number(p.cu_seqlens_kv, b, p.total_kv);
      s.kv_rows = math::smaller(math::larger(number(p.cu_seqlens_kv, b + 1, p.total_kv) - s.kv_begin, 0), p.seqlen_kv);
    }
    s.band = Band::of(p.band, p.q_lengths.data == nullptr ? s.q_rows : number(p.q_lengths, b, s.q_rows),
                      p.kv_lengths.data == nullptr ? s.kv_rows : number(p.kv_lengths, b, s.kv_rows));
    return s;
  }

  FOVEA_DEVICE char* q_row(const RowView& view, int i, int head) const {
    return view.data + batch * view.batch + (q_begin + i64{i}) * view.row + head * view.head;
  }
  FOVEA_DEVICE char* kv_row(const RowView& view, int j, int head) const {
    return view.data + batch * view.batch + (kv_begin + i64{j}) * view.row + head * view.head;
  }
  FOVEA_DEVICE float* statistic(const StatView& view, int i, int head) const {
    return view.data + batch * view.batch + head * view.head + (q_begin + i64{i}) * view.row;
  }
  FOVEA_DEVICE char* entry(const EntryView& view, int i, int j, int head) const {
    return view.data + batch * view.batch + head * view.head + i * view.query + j * view.key;
  }
};

/// Fills a tile by `kThreads` threads: its first `rows` rows from `from` on, `stride` bytes apart, `row_bytes` bytes of
/// each; all else becomes 0.  The caller closes and awaits the copies.
template <bool kAsync, int kThreads, class Tile>
FOVEA_DEVICE void load_tile(const Tile& tile, const char* from, i64 stride, int rows, int row_bytes, bool aligned) {
  constexpr int kPieces = Tile::kPieces, kLanes = kPieces >= 32   ? 32
                                                  : kPieces >= 16 ? 16
                                                  : kPieces >= 8  ? 8
                                                  : kPieces >= 4  ? 4
                                                                  : 2;
  const int first = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const char* next = from + first * stride;
  const char* const safe = from;  // where nothing is read, an address is still formed
  u32 to = tile.base + static_cast<u32>(first * Tile::kPitch);
  if (aligned) {
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kThreads / kLanes) {
      const bool real = first + row < rows;
#pragma unroll
      for (int piece = 0; piece < kPieces; piece += kLanes) {
        const int at = (piece + lane) * 16;
        if (kPieces % kLanes != 0 && piece + lane >= kPieces) break;
        if (Tile::kRows % (kThreads / kLanes) != 0 && first + row >= Tile::kRows) break;
        const int bytes = real ? math::smaller(math::larger(row_bytes - at, 0), 16) : 0;
        copy_16<kAsync>(to + at, bytes > 0 ? next + at : safe, bytes);
      }
      next += kThreads / kLanes * stride;
      to += kThreads / kLanes * Tile::kPitch;
    }
  } else {
#pragma unroll 1
    for (int row = first; row < Tile::kRows; row += kThreads / kLanes) {
#pragma unroll 1
      for (int at = lane * 16; at < kPieces * 16; at += kLanes * 16) {
        store_shared_16(tile.base + row * Tile::kPitch + at,
                        row < rows ? gather_16(from + row * stride + at, row_bytes - at) : uint4{});
      }
    }
  }
}

/// The same where rows lie anywhere: row r at row_at(r).
template <bool kAsync, int kThreads, class Tile, class RowAt>
FOVEA_DEVICE void load_scattered_tile(const Tile& tile, int rows, int row_bytes, bool aligned, const RowAt& row_at) {
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * Tile::kPieces; at += kThreads) {
    const int row = at / Tile::kPieces, piece = at % Tile::kPieces * 16;
    const u32 to = tile.base + row * Tile::kPitch + piece;
    const int bytes = row < rows ? math::smaller(math::larger(row_bytes - piece, 0), 16) : 0;
    if (aligned) {
      copy_16<kAsync>(to, row_at(bytes > 0 ? row : 0) + (bytes > 0 ? piece : 0), bytes);
    } else {
      store_shared_16(to, bytes > 0 ? gather_16(row_at(row) + piece, bytes) : uint4{});
    }
  }
}

}  // namespace fovea::cuda
