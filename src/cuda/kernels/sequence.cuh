#pragma once

#include "cuda/kernels/mma.cuh"

// Where the rows and keys of one sequence lie, and what they may see.
namespace fovea::cuda {

struct Sequence {
  int batch;
  int q_begin, q_rows;    // rows of out to be written; band.seqlen_q of them are real
  int kv_begin, kv_rows;  // rows of dk and dv to be written; band.seqlen_kv of them are real
  math::Band band;

  FOVEA_DEVICE Sequence(const CallParams& p, int b) : batch(b), q_begin(0), q_rows(p.seqlen_q), kv_begin(0), kv_rows(p.seqlen_kv) {
    // The host cannot see these numbers: whatever they are, nothing outside the tensors is touched.
    const auto number = [](const IndexView& view, int i, int most) {
      return math::smaller(math::larger(view.data[i * view.stride], 0), most);
    };
    if (p.cu_seqlens_q.data != nullptr) {
      q_begin = number(p.cu_seqlens_q, b, p.total_q);
      q_rows = math::smaller(math::larger(number(p.cu_seqlens_q, b + 1, p.total_q) - q_begin, 0), p.seqlen_q);
      kv_begin = number(p.cu_seqlens_kv, b, p.total_kv);
      kv_rows = math::smaller(math::larger(number(p.cu_seqlens_kv, b + 1, p.total_kv) - kv_begin, 0), p.seqlen_kv);
    }
    const int len_q = p.q_lengths.data == nullptr ? q_rows : number(p.q_lengths, b, q_rows);
    const int len_kv = p.kv_lengths.data == nullptr ? kv_rows : number(p.kv_lengths, b, kv_rows);
    band = math::Band::of(p.band, len_q, len_kv);
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

/// Fills a tile by `kThreads` threads: row r from row_at(r), its first `row_bytes` bytes; all else, and rows from `rows`
/// on, becomes 0.  The caller closes and awaits the copies.
template <bool kAsync, int kThreads, class Tile, class RowAt>
FOVEA_DEVICE void load_tile(const Tile& tile, int rows, int row_bytes, bool aligned, const RowAt& row_at) {
  constexpr int kPieces = Tile::kPieces;
  if (aligned) {
#pragma unroll
    for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * kPieces; at += kThreads) {
      const int row = at / kPieces, piece = at % kPieces;
      const bool real = row < rows;
      const int bytes = real ? math::smaller(math::larger(row_bytes - piece * 16, 0), 16) : 0;
      copy_16<kAsync>(tile.base + row * Tile::kPitch + piece * 16, bytes > 0 ? row_at(row) + piece * 16 : row_at(0), bytes);
    }
  } else {
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < Tile::kRows * kPieces; at += kThreads) {
      const int row = at / kPieces, piece = at % kPieces;
      uint4 x{};
      if (row < rows) x = gather_16(row_at(row) + piece * 16, row_bytes - piece * 16);
      store_shared_16(tile.base + row * Tile::kPitch + piece * 16, x);
    }
  }
}

}  // namespace fovea::cuda
