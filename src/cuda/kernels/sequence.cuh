#pragma once

#include "cuda/kernels/copies.cuh"
#include "cuda/packed_blocks.h"

// Where the rows and keys of one sequence lie, and what they may see.
namespace fovea::cuda {

struct Sequence {
  int batch;
  int q_begin, q_rows;    // rows of out to be written; band.seqlen_q of them are real
  int kv_begin, kv_rows;  // rows of dk and dv to be written; band.seqlen_kv of them are real
  Band band;

  /// A length or an offset, clamped to [0, most]: the host cannot check it, and no value may lead outside the tensors.
  FOVEA_DEVICE static int number(const IndexView& view, int i, int most) {
    return math::smaller(math::larger(view.data[i * view.stride], 0), most);
  }
  FOVEA_DEVICE static Sequence of(const CallParams& p, int b) {
    Sequence s{b, 0, p.seqlen_q, 0, p.seqlen_kv, {}};
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

/// The block of a packed sequence in a slot of rows (`group` rows a query) or keys; `begins`: p.cu_seqlens_q or _kv.
FOVEA_DEVICE PackedBlock packed_block(const CallParams& p, const IndexView& begins, int total, int size, int slot,
                                      int group = 1) {
  return PackedBlock::of([&](int b) { return Sequence::number(begins, b, total) * group; }, p.batch, size, slot);
}

/// Which head, and which of its `turns` blocks, a block of the grid works on.  Groups of `abreast` heads, as many as L2
/// has room for, take turns.
struct HeadTurn {
  int batch, head, turn;

  FOVEA_DEVICE static HeadTurn of(int number, int abreast, int turns, int heads, int batch) {
    const int of_group = abreast * turns, group = number / of_group, rest = number - group * of_group;
    const int here = math::smaller(abreast, batch * heads - group * abreast);
    const int turn = rest / here, line = group * abreast + rest - turn * here;
    return {line / heads, line % heads, turn};
  }
};

}  // namespace fovea::cuda
